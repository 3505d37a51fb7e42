"""A trial's checkpoints: written with digests, and read again only as they were written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.fs
from ray.train import Checkpoint

from tuning.plan import Plan
from tuning.scratch import scratch
from wesam import Report
from wesam.errors import InputError
from wesam.sam.checkpoints import own_file

PROGRESS_FILE = "progress.json"
"""Beside the adapter in a checkpoint: a :class:`Progress`, and the digest of every other file."""

DIGESTS = "files"


@dataclass(frozen=True)
class Progress:
    """What a trial had reached at a checkpoint."""

    step: int
    best: float
    """The best score until then; -inf before the first evaluation."""
    best_here: bool
    """Whether it is the score of this very checkpoint."""


def folder_of(checkpoint: Path, domain: str, plan: Plan) -> Path:
    """Where a checkpoint has a domain's adapter: in itself, or in a joint study in a folder of the domain's name."""
    return checkpoint / domain if plan.joint else checkpoint


@contextmanager
def written(progress: Progress, reports: Mapping[str, Report], plan: Plan) -> Iterator[Checkpoint]:
    """A checkpoint of all domains' adaptations, in a folder that is there until the end of the block."""
    with scratch() as folder:
        for domain, report in reports.items():
            report.save(folder_of(folder, domain, plan))
        told = {**asdict(progress), DIGESTS: _digests(folder)}
        (folder / PROGRESS_FILE).write_text(json.dumps(told))
        yield Checkpoint.from_directory(folder)


def progress_of(folder: Path) -> Progress:
    """What had been reached at the checkpoint in this folder.

    Raises InputError if any of its files is not as it was written.
    """
    try:
        told = json.loads(own_file(folder / PROGRESS_FILE).read_text())
        whole = told.pop(DIGESTS).items() <= _digests(folder).items()  # Ray may have put files of its own there
        found = Progress(int(told["step"]), float(told["best"]), bool(told["best_here"]))
        whole = whole and not math.isnan(found.best)
    except (OSError, InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise InputError("the checkpoint is damaged: a file of it is not as it was written")
    return found


@contextmanager
def intact(found: Checkpoint | None) -> Iterator[tuple[Checkpoint | None, Path | None, Progress]]:
    """The checkpoint, or of those beside it the latest one before it, whose files are as they were written.

    With its folder on this machine, until the end of the block, and what had been reached; None, None and
    :data:`NOTHING` where there is none.
    """
    for candidate in _until(found) if found else []:
        with candidate.as_directory() as folder:
            try:
                reached = progress_of(Path(folder))
            except InputError:
                continue
            yield candidate, Path(folder), reached
            return
    yield None, None, NOTHING


def at(path: str, storage: str) -> Checkpoint:
    """The checkpoint at a path of the study's storage, as a checkpoint itself tells it."""
    filesystem = pyarrow.fs.FileSystem.from_uri(storage)[0] if "://" in storage else None
    return Checkpoint(path, filesystem)


def _until(found: Checkpoint) -> Iterator[Checkpoint]:
    """The checkpoint and those before it in the same folder; Ray's names of them are in the order of writing."""
    folder, _, name = found.path.rstrip("/").rpartition("/")
    assert found.filesystem is not None
    seen = found.filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    names = {f.base_name for f in seen if f.type == pyarrow.fs.FileType.Directory and f.base_name <= name}
    for each in sorted((n for n in names if n.startswith("checkpoint_")), reverse=True):
        yield Checkpoint(f"{folder}/{each}", found.filesystem)


def _digests(folder: Path) -> dict[str, str]:
    """Of every file in the folder but the one that holds them, by its path in it."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f != folder / PROGRESS_FILE)
    return {f.relative_to(folder).as_posix(): hashlib.blake2b(f.read_bytes()).hexdigest() for f in files}


NOTHING = Progress(0, -math.inf, best_here=False)
"""Before the first step."""
