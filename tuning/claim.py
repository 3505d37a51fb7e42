"""A study, or a table, is run by one process at a time: its run in MLflow says by which, and that it is alive."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from mlflow.entities import Run as Stored
from mlflow.exceptions import MlflowException

from tuning.processes import began, machine
from tuning.tracking import Level, Run, Tracker
from wesam.errors import InputError

TAG = "wesam.driver"
BEAT = 5.0
"""Seconds between two signs of life."""

SETTLED = 1.0
"""Seconds after which of several claims made at once only the last one is there."""


def refuse_second(tracker: Tracker, stored: Stored) -> None:
    """Raises InputError if a process is running this study.

    Whether a process of this machine lives is known at once; one of another machine is listened to for three beats.
    """
    if stored.info.status != "RUNNING" or TAG not in stored.data.tags:
        return
    told = json.loads(stored.data.tags[TAG])
    if told["where"] == machine():
        alive = _lives(told)
    else:
        time.sleep(3 * BEAT)
        alive = tracker.run(stored.info.run_id).data.tags.get(TAG) != stored.data.tags[TAG]
    if alive:
        raise _refusal(stored, told)


@contextlib.contextmanager
def held(
    tracker: Tracker, run: Run, name: str, before: Stored | None = None, *, level: Level = "study"
) -> Iterator[None]:
    """Says in the study's run that this process runs it, until the end of the block.

    before: the run when :func:`refuse_second` has looked at it, if it is an earlier one.

    Raises InputError, and leaves the study to the other, if another process has begun the same at the same moment.
    """
    mine = {
        "where": machine(), "host": platform.node(), "pid": os.getpid(), "began": began(os.getpid()),
        "token": uuid.uuid4().hex,
    }  # fmt: skip
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(Exception):  # a server that is away is another one's concern
                tracker.client.set_tag(run.id, TAG, json.dumps({**mine, "beat": count}))

    known = before.data.tags.get(TAG) if before else None

    def write() -> Stored | None:
        """Claims the study, unless somebody else has since, whose run is returned."""
        try:
            if (now := tracker.client.get_run(run.id)).data.tags.get(TAG) == known:
                tracker.client.set_tag(run.id, TAG, json.dumps(mine))
                return None
        except MlflowException:  # a database takes a new tag of one process only
            if (now := tracker.client.get_run(run.id)).data.tags.get(TAG) == known:
                raise
        return now

    other = tracker.later(write).result()
    if other and (told := json.loads(other.data.tags[TAG]))["token"] != mine["token"]:  # else an answer was lost
        run.leave()
        raise _refusal(other, told)
    time.sleep(SETTLED)
    for stored in tracker.find(level):
        if stored.info.run_id == run.id:
            told = json.loads(stored.data.tags[TAG])
            if told["token"] != mine["token"]:
                run.leave()
                raise _refusal(stored, told)
        elif (
            stored.data.tags["wesam.name"] == name
            and stored.info.status == "RUNNING"
            and TAG in stored.data.tags
            and (stored.info.start_time, stored.info.run_id) < (run.info.start_time, run.id)
        ):
            run.delete()
            raise _refusal(stored, json.loads(stored.data.tags[TAG]))
    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _refusal(stored: Stored, told: dict[str, Any]) -> InputError:
    return InputError(
        f"the {stored.data.tags['wesam.level']} {stored.data.tags['wesam.name']!r} is running already, "
        f"in process {told['pid']} on {told['host']}: "
        "wait for its end, or stop it and go on here"
    )


def _lives(told: dict[str, Any]) -> bool:
    """Whether the process is there, and no other that got its number."""
    return bool(began(told["pid"]) == told["began"])
