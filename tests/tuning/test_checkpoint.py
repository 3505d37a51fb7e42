"""Checkpoints that are damaged are not gone on from, with real files and the embedded model."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.train import Checkpoint

from tuning import checkpoint, trainer
from tuning.checkpoint import PROGRESS_FILE, Progress, intact, progress_of
from tuning.listener import _Seen
from tuning.plan import make_plan
from wesam import adapt, load_domain, load_sam
from wesam.adapt import STATE_FILE
from wesam.adapters import WEIGHTS_FILE
from wesam.errors import InputError


@pytest.fixture(scope="module")
def trial(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial's folder with checkpoints of its steps 1 and 2, as Ray names them."""
    folder = tmp_path_factory.mktemp("trial")
    plan = make_plan({"name": "s", "domains": [str(small)]}, ["lora.rank=1", "optim.batch_size=1", "steps=2"])
    for report in adapt(load_sam(), load_domain(str(small)), replace(plan.base, eval_every=2)):
        if report.step:
            best = report.step == 1
            with checkpoint.written(Progress(report.step, 0.5, best), {"small": report}, plan) as made:
                shutil.copytree(made.path, folder / f"checkpoint_{report.step:06}")
    (folder / "checkpoint_000002" / ".metadata.json").write_text("{}")  # as Ray does
    return folder


@pytest.fixture
def folder(trial: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trial, tmp_path / "trial"))


def found(folder: Path) -> int | None:
    with intact(Checkpoint(str(folder / "checkpoint_000002"))) as (used, _, reached):
        return reached.step if used else None


def test_a_checkpoint_says_how_far_it_is(folder: Path) -> None:
    assert found(folder) == 2
    assert progress_of(folder / "checkpoint_000001") == Progress(1, 0.5, best_here=True)


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil(file: Path) -> None:
    """Another byte in the middle, which no format notices by itself."""
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"),
    [(d, n) for d in (halve, Path.unlink) for n in (WEIGHTS_FILE, STATE_FILE, PROGRESS_FILE)]
    + [(spoil, WEIGHTS_FILE), (spoil, STATE_FILE)],
)
def test_of_a_damaged_one_the_one_before_is_taken(folder: Path, damage: Any, name: str) -> None:
    damage(folder / "checkpoint_000002" / name)
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        progress_of(folder / "checkpoint_000002")
    assert found(folder) == 1
    halve(folder / "checkpoint_000001" / name)
    assert found(folder) is None


def test_a_checkpoint_that_is_gone_is_as_good_as_damaged(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoint_000002")
    assert found(folder) == 1
    shutil.rmtree(folder)
    assert found(folder) is None


@pytest.fixture
def told(small: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[trainer.Setting, Any, list[Any]]:
    """A trial's setting and configuration, and the results that it has sent."""
    monkeypatch.setattr(trainer.Notice, "came", lambda self: False)
    plan = make_plan(
        {"name": "s", "domains": [str(small)]}, ["lora.rank=1", "optim.batch_size=1", "steps=3", "eval_every=1"]
    )
    direct = {str(small): next(iter(adapt(load_sam(), load_domain(str(small)), plan.base))).val}
    return trainer.Setting(plan=plan, direct=direct, resources={"CPU": 1}), plan.base, []  # type: ignore[arg-type]


@pytest.mark.parametrize(("damaged", "first"), [([], 3), (["2"], 2), (["2", "1"], 1)], ids=["none", "last", "both"])
def test_a_trial_goes_on_from_the_last_intact_one(
    folder: Path, told: tuple[trainer.Setting, Any, list[Any]], damaged: list[str], first: int
) -> None:
    for n in damaged:
        halve(folder / f"checkpoint_00000{n}" / STATE_FILE)
    setting, config, sent = told
    trainer._from_checkpoint(
        setting, config, None, Checkpoint(str(folder / "checkpoint_000002")), lambda *result: sent.append(result)
    )
    assert [result["step"] for result, _, _ in sent] == list(range(first, 4))
    told = sent[0][0]["from"]
    assert (told["step"], told["damaged"]) == (first - 1, bool(damaged))
    assert told["best"] == (-math.inf if first == 1 else 0.5)
    assert not [result for result, _, _ in sent[1:] if "from" in result]


def test_what_was_best_is_forgotten_only_if_it_is_damaged() -> None:
    def seen() -> _Seen:
        return _Seen("1", None, "", 9, step=8, best=0.7, best_step=4, latest="c8", checkpoint="c4")  # type: ignore[arg-type]

    kept, other, nothing = seen(), seen(), seen()
    kept.go_back(4, 0.7, "c4")
    other.go_back(2, -math.inf, "c2")
    nothing.go_back(0, -math.inf, None)
    assert (kept.best, kept.best_step, kept.checkpoint) == (0.7, 4, "c4")
    for one in (other, nothing):
        assert (one.best, one.best_step, one.checkpoint) == (-math.inf, 0, None)
    again = seen()
    again.go_back(2, 0.6, "c2")
    assert (again.best, again.best_step, again.checkpoint) == (0.6, 2, "c2")


def test_told_that_its_end_is_near_it_sends_a_checkpoint_once(
    told: tuple[trainer.Setting, Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, config, sent = told
    answers = iter([False, True, False, False])
    monkeypatch.setattr(trainer.Notice, "came", lambda self: next(answers))
    trainer.drive(setting, replace(config, steps=4, eval_every=4), None, -math.inf, lambda *r: sent.append(r))
    assert [(r["step"], r["saved"], progress.step) for r, progress, _ in sent] == [(2, True, 2), (4, False, 4)]
    assert sent[0][0]["best_score"] == -math.inf
    assert not sent[0][1].best_here
