#!/usr/bin/env bash
# Starts an MLflow server with logins, for this machine only: cluster/mlflow-server.sh [FOLDER]
#
#   MLFLOW_BACKEND_STORE_URI      database, as in postgresql://user@host/mlflow (default: FOLDER/mlflow.db)
#   MLFLOW_ARTIFACTS_DESTINATION  folder or URL for artifacts (default: FOLDER/artifacts)
#   MLFLOW_AUTH_ADMIN_PASSWORD    of the user admin, at the first start (default: made up); kept in FOLDER/admin-password
#   MLFLOW_PORT                   (default: 5000)
#   MLFLOW_WORKERS                processes that answer (default: 2)
set -euo pipefail
umask 077

root=$(cd "$(dirname "$0")/.." && pwd)
mlflow=$root/.venv/bin/mlflow
[ -x "$mlflow" ] || mlflow=mlflow
mkdir -p "${1:-mlflow-server}"
folder=$(cd "${1:-mlflow-server}" && pwd)

kept() { # FILE [VALUE]: its contents, which at first are the value, or random
  [ -s "$1" ] || echo "${2:-$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')}" > "$1"
  cat "$1"
}

MLFLOW_AUTH_ADMIN_PASSWORD=$(kept "$folder/admin-password" "${MLFLOW_AUTH_ADMIN_PASSWORD:-}")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(kept "$folder/secret-key")
echo "user admin, password in $folder/admin-password"
export MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
export MLFLOW_BACKEND_STORE_URI="${MLFLOW_BACKEND_STORE_URI:-sqlite:///$folder/mlflow.db}"
export MLFLOW_ARTIFACTS_DESTINATION="${MLFLOW_ARTIFACTS_DESTINATION:-$folder/artifacts}"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false  # or six more processes wait for jobs that studies never have
export MLFLOW_AUTH_CONFIG_PATH="$folder/basic_auth.ini"

cat > "$MLFLOW_AUTH_CONFIG_PATH" <<EOF
[mlflow]
default_permission = READ
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
admin_username = admin
auth_cache_ttl_seconds = 60
EOF

# uvicorn ends workers that do not answer it within 5 s, and importing MLflow takes longer on a busy machine
exec "$mlflow" server --app-name basic-auth --host 127.0.0.1 --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-2}" \
  --uvicorn-opts "--timeout-worker-healthcheck 120"
