"""The study: Ray runs the trials, Optuna proposes them, MLflow remembers them; ``wesam`` does the adapting."""

import os

URI_VARIABLE = "MLFLOW_TRACKING_URI"
DEFAULT_URI = "sqlite:///mlflow.db"
"""Where MLflow is unless the variable, or an option, says otherwise."""

# Read by Ray and MLflow when they are imported, so it stands before every import of them.
_QUIET = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # Tracker waits by itself, and says so
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # today's default warns of tomorrow's
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a frame even when told to be silent
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a worker
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the cluster must not start another
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a result of several workers is heard of; default 2
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has the results
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that diverges at once has no results
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # a study is resumed from MLflow, not from Ray's pickles of all trials
    "TUNE_ONLY_STORE_CHECKPOINT_SCORE_ATTRIBUTE": "1",  # of a checkpoint's result nothing is needed
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)
