"""Temporary folders of killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tuning.processes import began
from tuning.scratch import scratch

KILLED = """
import os, signal
from tuning.scratch import scratch
with scratch() as folder:
    (folder / "a").write_text("a")
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_goes_with_the_next_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, cwd=root)
    left = Path(done.stdout.strip())
    assert left.parent == tmp_path
    assert left.is_dir()
    others = ("wesam-2023-results", "wesam-60-steps", left.name.replace("wesam-", "wesam-0"))
    kept = {tmp_path / name for name in others}
    for folder in kept:  # the last is of another machine that has the same folder for such
        folder.mkdir()
    with scratch() as mine, scratch() as another:
        assert {p.name for p in tmp_path.iterdir()} == {mine.name, another.name, *(k.name for k in kept)}
    assert set(tmp_path.iterdir()) == kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere it is told by the clock")
def test_a_process_is_the_same_after_the_clock_has_been_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = began(os.getpid())
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1.0)
    assert began(os.getpid()) == before
    assert began(1) != before
    assert began(2**22 + 1) is None
