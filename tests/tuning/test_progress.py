"""What a study shows where nobody looks at a terminal, and what the table would hold."""

from __future__ import annotations

import pytest

from tuning import progress
from tuning.progress import Board


def test_lines_count_what_is_done_and_reckon_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    board = Board(["a", "b"], ["a", "b"], 4, 60)
    with board:
        board.expect("b", 6, 4)
        board.at("a", "1", 0)
        now[0] += 30
        board.at("a", "1", 60)
        board.ended("a", "1", "trial 1/4  done", early=False)
        board.at("a", "2", 20)
        board.ended("a", "2", "trial 2/4  stopped", early=True)
        board.at("b", "5", 20)
        capsys.readouterr()
        board.tick()
        assert capsys.readouterr().out == "", "there has just been a line"
        now[0] += 31
        board.tick()
        # 100 steps in 61 s; two trials of 40 steps are left of a, and two of 60 less 20 of b
        assert capsys.readouterr().out == " 1:01  6 of 10 trials done, about 1:49 left; running: b 5 at step 20\n"


def test_a_line_says_what_is_done_before_there_are_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Board(["a", "b"], ["a", "b"], 4, 60) as board:
        with board.scoring("b", "the unadapted model"):
            now[0] += 31
            board.tick()
        now[0] += 31
        board.tick()
    assert capsys.readouterr().out.splitlines() == [
        " 0:31  0 of 8 trials done; scoring b, the unadapted model", " 1:02  0 of 8 trials done"
    ]  # fmt: skip


def test_the_table_has_the_best_beside_direct() -> None:
    board = Board(["a"], ["a"], 4, 60)
    board.scores("a", direct=0.6)
    board.scores("a", best=0.55, paper=0.55)
    cells = [next(iter(column.cells)) for column in board._table().columns]
    assert cells == ["a", "0/4", "0", "0", "0.600", "0.550", "0.600", "+0.0"], "Direct is a candidate"
    board.scores("a", best=0.65)
    assert list(board._table().columns[-1].cells) == ["+5.0"]
