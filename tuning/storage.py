"""Optuna's database, which is asked for little, and waited for while it is away."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialParamModel
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session

from tuning.plan import shown

PATIENCE = 5.0
"""Seconds between two attempts to reach a database that does not answer."""

CALLS = (
    "create_new_study", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_all_studies",
    "get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr", "set_study_system_attr",
    "_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id", "get_trial",
    "get_trial_id_from_study_id_trial_number", "set_trial_state_values", "set_trial_intermediate_value",
    "set_trial_user_attr", "set_trial_system_attr",
)  # fmt: skip
"""What Optuna asks of a database; each is one transaction."""


class StudyStorage(RDBStorage):
    """A database in which all trials of a study have one space, as :func:`tuning.sampler.open_study` sees to it: a
    parameter is not compared with those of earlier trials, two queries each.
    """

    def _set_trial_param_without_commit(
        self, session: Session, trial_id: int, name: str, value: float, distribution: BaseDistribution, *_: Any
    ) -> None:
        told = distribution_to_json(distribution)
        session.add(TrialParamModel(trial_id=trial_id, param_name=name, param_value=value, distribution_json=told))


class PatientStorage(StudyStorage):
    """A database on a server: a call that finds it away, or loses it, is made again until it answers."""


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatientStorage, *given: Any, **options: Any) -> Any:
        told = False
        while True:
            try:
                return method(self, *given, **options)
            except UpdateFinishedTrialError:
                if not told:
                    raise
                return True  # the record had been taken, only the answer was lost
            except Exception as e:
                if not any(isinstance(c, (OperationalError, InterfaceError)) for c in (e, e.__cause__)):
                    raise
                if not told:
                    print(f"Optuna's {shown(self.url)} does not answer; waiting, nothing is lost", file=sys.stderr)
                told = True
                time.sleep(PATIENCE)

    return call


for _name in CALLS:
    setattr(PatientStorage, _name, _patient(getattr(StudyStorage, _name)))
