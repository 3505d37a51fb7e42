"""Two processes do not run the same study, on a real MLflow database."""

from __future__ import annotations

import json
import os
import threading

import psutil
import pytest

from tuning import claim
from tuning.tracking import Run, Tracker
from wesam.errors import InputError


def start(tracker: Tracker) -> Run:
    run = tracker.start("s", "study", None, {})
    tracker.flush()
    return run


def test_while_one_runs_it_another_is_refused_and_afterwards_not(tracker: Tracker, uri: str) -> None:
    run = start(tracker)
    other = Tracker(uri)
    with claim.held(tracker, run, "s"):
        (stored,) = other.find("study")
        with pytest.raises(InputError, match=f"'s' is running already, in process {os.getpid()}"):
            claim.refuse_second(other, stored)
    run.close()
    tracker.flush()
    claim.refuse_second(other, other.find("study")[0])
    other.close()


def test_a_process_that_is_gone_does_not_count(tracker: Tracker) -> None:
    run = start(tracker)
    with claim.held(tracker, run, "s"):
        pass
    (stored,) = tracker.find("study")
    told = json.loads(stored.data.tags[claim.TAG])
    for gone in ({"pid": 2**22 + 1}, {"pid": 1, "began": psutil.Process(1).create_time() - 60}):
        stored.data.tags[claim.TAG] = json.dumps({**told, **gone})
        claim.refuse_second(tracker, stored)


def test_another_machine_is_listened_to(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT", 1.0)
    run = start(tracker)
    monkeypatch.setattr(claim, "machine", lambda: "there")
    with claim.held(tracker, run, "s"):
        monkeypatch.setattr(claim, "machine", lambda: "here")
        (stored,) = tracker.find("study")
        with pytest.raises(InputError, match="running already"):
            claim.refuse_second(tracker, stored)
    claim.refuse_second(tracker, tracker.find("study")[0])  # no longer heard of


@pytest.mark.parametrize("again", [False, True], ids=["new", "gone on with"])
def test_of_two_at_once_one_goes_on(tracker: Tracker, uri: str, again: bool) -> None:
    trackers = [tracker, Tracker(uri)]
    if again:
        start(tracker).close("KILLED")
        tracker.flush()
        (stored,) = tracker.find("study")
        runs = [t.reopen(stored) for t in trackers]
    else:
        runs = [start(t) for t in trackers]
    ends: list[str] = []
    both = threading.Barrier(2)

    def run(mine: Tracker, run: Run) -> None:
        both.wait()
        try:
            with claim.held(mine, run, "s"):
                ends.append("held")
        except InputError as e:
            ends.append(str(e))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(trackers, runs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == 2
    assert "held" in ends
    assert any("running already" in e for e in ends)
    (left,) = tracker.find("study")
    assert left.info.status == "RUNNING", "the one that goes on"
    trackers[1].close()
