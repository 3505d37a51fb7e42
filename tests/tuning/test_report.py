"""What a report works out by itself."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuning import gap, page, plots
from tuning.conclusion import _finalists, _verdict, missing
from tuning.confirm import FINALIST, SEED, SUPERVISED
from tuning.findings import Findings, Trust, front
from tuning.opening import Opening, opening
from tuning.plan import Plan, columns, make_plan
from tuning.report import _chosen, _front, _gap, _warmth
from tuning.space import Axis
from tuning.tracking import Trial
from wesam.config import PromptKind


def test_trust_in_the_label_free_score_by_hand() -> None:
    direct = (0.5, 0.6)
    trials = [[(0.4, 0.5), (0.6, 0.7)], [(0.7, 0.75), (0.2, 0.9)], [(0.8, 0.72)]]
    found = Trust.of(direct, trials)
    assert found is not None
    assert found.spearman == pytest.approx(0.5), "ranks 1 2 3 against 1 3 2"
    assert found.regret == pytest.approx(0.9 - 0.72)
    assert Trust.of(direct, trials[:2]) is None, "too few to tell"
    assert Trust.of(direct, [[(0.5, 0.6)]] * 4) is None, "nothing to rank"
    alone = Trust.of((0.99, 0.6), trials)
    assert alone is not None
    assert alone.regret == pytest.approx(0.9 - 0.6), "Direct is a candidate"
    tied = Trust.of(direct, [[(0.9, 0.6), (0.9, 0.9)], [(0.9, 0.7)], [(0.2, 0.5)]])
    assert tied is not None
    assert tied.regret == pytest.approx(0.9 - 0.6), "of those that tie the first is taken, not the best in hindsight"


def trial(number: int, best: float, label: str = "searched", reference: str | None = None) -> Trial:
    return Trial(
        number=number, run_id="", label=label, reference=reference, point={}, config={}, best=best, best_step=10,
        step=20, ended="finished", gap=None, metrics={},
    )  # fmt: skip


def test_trials_that_are_missing_have_failed_or_the_budget_was_spent() -> None:
    found = [trial(1, 0.5), trial(2, 0.5)]
    assert missing(2, 2, found) == ""
    assert missing(3, 3, found) == "; 1 of 3 trials failed"
    cut = replace(found[1], ended="budget")
    assert (
        missing(9, 2, [found[0], cut]) == "; the budget was spent after 2 of 9 trials, 1 of them not at their last step"
    )
    assert missing(9, 3, found).endswith("after 3 of 9 trials, 0 of them not at their last step; 1 of 9 trials failed")


def test_what_a_warm_start_was_worth_is_told_by_the_trials_after_it() -> None:
    first = [
        trial(1, 0.9, "paper's hyperparameters", "paper"),
        trial(2, 0.6, "best of a/x"),
        trial(3, 0.7, "best of a/y"),
    ]
    assert _warmth(first[:1]) is None
    told = _warmth([*first, trial(4, 0.5), trial(5, 0.75)])
    assert told is not None
    assert "trial 3, the best of a/y, has 0.700" in told
    assert "took 2 and 40 steps" in told
    assert "none of the search's own 1 trials" in (_warmth([*first, trial(4, 0.5)]) or "")


def test_of_finalists_the_second_training_decides_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions of a trial that is not the winner, as an enlarged study has them, say nothing of the winner."""

    def role(seed: int, of: int, best: float) -> Trial:
        return replace(trial(seed, best), of=of)

    found = {
        None: [trial(1, 0.70), trial(2, 0.71), trial(3, 0.66)], FINALIST: [role(4, 2, 0.68), role(4, 1, 0.70)],
        SEED: [role(1, 1, 0.69), role(1, 2, 0.72), role(2, 1, 0.695)], SUPERVISED: [trial(1, 0.75)],
    }  # fmt: skip
    monkeypatch.setattr("tuning.conclusion.trials_by_role", lambda tracker, run: found)
    runs = [
        SimpleNamespace(data=SimpleNamespace(tags={"wesam.trial": n}, metrics={"gpu_hours": 0.5})) for n in "12334"
    ]  # the fourth has failed, the third had to be begun twice
    tracker: Any = SimpleNamespace(each=lambda *given, **options: runs)
    verdict = _verdict(tracker, "", 0.6)
    assert (verdict.begun, verdict.hours) == (4, 2.5)
    assert verdict.best == found[None][0]
    assert [t.best for t in verdict.again] == [0.69, 0.695]
    assert verdict.chosen == verdict.best
    assert _finalists(verdict) == [
        {"trial": 2, "searched": 0.71, "again": 0.68}, {"trial": 1, "searched": 0.70, "again": 0.70}
    ]  # fmt: skip
    assert not _verdict(tracker, "", 0.695).beaten, "Direct is as good as the repetitions"


def test_how_one_of_several_that_are_nearly_as_good_was_chosen_is_told() -> None:
    final = [{"trial": 5, "searched": 0.70, "again": 0.72}, {"trial": 3, "searched": 0.708, "again": 0.69}]
    assert _chosen({"finalists": final, "best_trial": 5}) == (
        "On val 2 trials were nearly as good, and were trained again with another seed. The means of both: "
        "trial 3 0.699, trial 5 0.710; trial 5 was chosen."
    )
    assert "chosen" not in (_chosen({"finalists": final, "best_trial": None}) or "")
    assert _chosen({"finalists": final[:1], "best_trial": 3}) == (
        "On val others were nearly as good, and one was trained again: the mean of both is trial 5 0.710; trial 3 was "
        "chosen."
    )
    assert _chosen({"finalists": [], "best_trial": 5}) is None
    assert _chosen({}) is None, "of a study from before there were finalists"


@pytest.mark.parametrize(
    ("supervised", "closed"),
    [([0.69, 0.71], 0.5), ([0.60, 0.66], None), ([0.59], None), ([0.65], 1.0), ([], None)],
)
def test_of_a_gap_within_its_spread_no_share_is_told(supervised: list[float], closed: float | None) -> None:
    share = gap.closed(0.6, 0.65, supervised)
    assert share == (closed and pytest.approx(closed))
    mean = statistics.mean(supervised) if supervised else None
    spread = statistics.stdev(supervised) if len(supervised) > 1 else None
    said = _gap({"direct": 0.6, "best": 0.65, "supervised": mean, "supervised_sd": spread, "gap_closed": share})
    assert (said is None) == (not supervised)
    assert said is None or ("spread" in said) == (closed is None and spread is not None)
    assert said is None or ("no gap to close" in said) == (closed is None)


def row(**changed: Any) -> dict[str, Any]:
    """A domain's line of the result, of a search that found something."""
    known = {
        "domain": "nuclei", "joint": "", "score": "miou", "box_filled": 0.4, "ellipse": 0.5, "direct": 0.6,
        "paper": 0.62, "best": 0.65, "best_sd": 0.01, "best_trial": 3, "version": 2,
        "val": {"score": "miou", "direct": 0.6, "ellipse": 0.5},
    }  # fmt: skip
    return {**known, **changed}


def begun(*rows: dict[str, Any], prompt: PromptKind = "box", **champions: int) -> Opening:
    result = {"model": "nano", "prompt": prompt, "trials": 8, "steps": 60, "seeds": 3, "domains": list(rows)}
    return opening(result, champions)


def test_a_report_begins_with_what_was_searched_found_and_is_to_be_used() -> None:
    told = begun(row(), row(domain="cells", best=0.6, best_trial=None), nuclei=2)
    assert "of the model nano was sought for the domains nuclei and cells, with box prompts: 8 trials" in told.searched
    assert told.found == [
        "nuclei: the best found has 0.650 ± 0.010, 5.0 points above Direct (0.600) and 3.0 points above the paper's "
        "hyperparameters (0.620).",
        "cells: no adapter beat Direct (0.600).",
    ]
    assert told.use == (
        "Use the adapter for nuclei: `python -m tuning best nuclei --out DIR` writes it, with its configuration and "
        "its card. For cells use the model as it is."
    )
    assert begun({"domain": "x", "error": "no room"}) == replace(
        begun(row(domain="x")), found=["x: the search failed (no room)."], use=""
    )


@pytest.mark.parametrize(
    ("changed", "found", "use"),
    [
        ({"best_sd": 0.06}, "smaller than the spread over seeds (6.0 points)", "may help, or may not"),
        ({"best_sd": None, "paper": None}, "(0.600). Its spread over seeds is not known.", "Use the adapter"),
        ({"best": 0.59}, "1.0 points below Direct (0.600)", "use the model as it is"),
        ({"ellipse": 0.7}, "But an ellipse drawn in the box has 0.700 and needs no model.", "use no model at all"),
        ({"box_filled": 0.65}, "But the box filled has 0.650", "use no model at all"),
        ({"score": "label_free", "ellipse": None, "box_filled": None}, "(no masks are known)", "Use the adapter"),
        ({"version": 1}, "5.0 points above", "version 2, is champion"),
    ],
)
def test_what_speaks_against_an_adapter_is_said(changed: dict[str, Any], found: str, use: str) -> None:
    told = begun(row(**changed), nuclei=2)
    assert found in told.found[0]
    assert use in told.use


def test_other_ways_to_ask_are_advised_where_direct_gains_more_by_them_than_the_search_has_found() -> None:
    tried = {"images": 16, "asked": 0.6, "others": {"--crop 2": 0.66, "--prompt tight-box": 0.7}}
    val = {**row()["val"], "best": 0.65}
    told = begun(row(tried=tried, val=val), nuclei=2)
    assert told.found[0].endswith(
        "Without any training Direct has 0.700 with `--prompt tight-box` and 0.660 with `--crop 2` on 16 images of "
        "val, where it has 0.600 as it is asked here."
    )
    assert told.use.endswith("But for nuclei a study with `--prompt tight-box` or `--crop 2` is likely to find more.")
    for much in (None, {**tried, "others": {}}, {**tried, "others": {"--crop 2": 0.64}}):
        assert begun(row(tried=much, val=val), nuclei=2) == begun(row(val=val), nuclei=2)
    little = row(tried={**tried, "others": {"--crop 2": 0.605}}, val={**val, "best": 0.6})
    assert "training" not in begun(little, nuclei=2).found[0], "half a point is not worth it"


def test_where_no_box_is_given_none_can_be_drawn_in() -> None:
    told = begun(row(ellipse=0.7), prompt="point")
    assert "an ellipse drawn in the box, where one is given, has 0.700" in told.found[0]
    assert "Use the adapter" in told.use


@pytest.mark.parametrize(
    ("prompt", "drawn", "said"),
    [("coarse", "polygon_filled", "the given polygon filled has 0.680"),
     ("point", "nearest_click", "a click on the object than to one beside it has 0.680")],
)  # fmt: skip
def test_what_is_drawn_from_polygons_and_clicks_may_be_better_than_an_adapter(
    prompt: PromptKind, drawn: str, said: str
) -> None:
    told = begun(row(**{drawn: 0.68, "ellipse": 0.7}), prompt=prompt)
    assert f"{said} and needs no model." in told.found[0]
    assert "use no model at all: draw what is named above" in told.use
    assert "Use the adapter" in begun(row(**{drawn: 0.64}), prompt=prompt).use


def test_tables_of_a_result_have_the_drawings_that_were_made() -> None:
    assert list(columns([row()]))[:3] == ["box_filled", "ellipse", "direct"]
    assert list(columns([row(), row(polygon_filled=0.7)]))[:3] == ["box_filled", "ellipse", "polygon_filled"]
    coarse = {**row(), "val": {**row()["val"], "polygon_filled": 0.7}}
    assert Findings(coarse, [], {}, []).drawn == ("polygon filled", 0.7)
    unknown = row(box_filled=None, ellipse=None)
    assert list(columns([unknown])) == ["direct", "paper", "best", "supervised"]


def searched(tmp_path: Path, **settings: Any) -> tuple[Findings, Plan]:
    """A search with eight made-up trials, the first of them outside of the space."""
    plan = make_plan({"domains": ["camouflaged"], "name": "s", "storage": str(tmp_path), **settings}, [])
    generator = random.Random(0)
    found = []
    for n in range(1, 9):
        point = {p: axis.at(generator.random()) for p, axis in plan.space.items()}
        found.append(
            replace(
                trial(n, 0.6 + 0.01 * n, reference="paper" if n == 1 else None),
                point={} if n == 1 else point, config={p: str(v) for p, v in point.items()},
                metrics={"adapter_mb": 9.0 if n == 7 else float(n), "seconds_per_step": 1.0},
            )
        )  # fmt: skip
    curves = {t.number: [(0, 0.6), (10, t.best)] for t in found}
    pairs = [[(0.5, 0.6), (0.5 + 0.01 * (t.number % 4), t.best)] for t in found]
    return Findings(row(best_trial=8), found, curves, pairs), plan


def test_all_drawings_are_made_where_there_is_something_to_draw(tmp_path: Path) -> None:
    found, plan = searched(tmp_path, minimize=["size", "seconds"])
    drawn = plots.drawings(found, plan)
    assert list(drawn) == [
        "history.svg", "steps.svg", "label-free.svg", "pareto.svg", "parallel-coordinates.svg", "hyperparameters.svg"
    ]  # fmt: skip
    assert all(svg.startswith("<svg") for svg in drawn.values())
    hopeless = [replace(t, best=0.1 + 0.01 * t.number) for t in found.trials]
    assert "parallel-coordinates.svg" in plots.drawings(replace(found, trials=hopeless), plan)
    little = replace(found, trials=found.trials[:1], pairs=[[]])
    assert list(plots.drawings(little, make_plan({"domains": ["camouflaged"]}, []))) == ["history.svg", "steps.svg"]


def test_the_front_has_what_nothing_beats_in_score_and_costs(tmp_path: Path) -> None:
    found, plan = searched(tmp_path, minimize=["size", "seconds"])
    assert [t.number for t in front(found.trials, ["adapter_mb"])] == [8, 6, 5, 4, 3, 2, 1]
    told = _front(found.trials, plan)
    assert told is not None
    assert told.startswith("Pareto front on val: trial 8 (0.680; adapter_mb 8, seconds_per_step 1); trial 6")
    assert _front(found.trials, replace(plan, minimize=())) is None


def test_the_table_of_trials_names_them_and_has_the_best_first(tmp_path: Path) -> None:
    found, plan = searched(tmp_path)
    found.trials[2] = replace(found.trials[2], label="model's defaults with box aids", ended="pruned")
    told = page.trials(found, plan.space)
    assert told.index("<td>8</td>") < told.index("<td>1</td>")
    assert told.count("class=best") == 1
    assert "model&#x27;s defaults with box aids, stopped early" in told
    assert "searched" not in told


def test_places_on_an_axis_are_even_where_draws_are() -> None:
    assert Axis(type="float", low=0.01, high=1, log=True).place(0.1) == pytest.approx(0.5)
    decay = Axis(type="float", low=0.9, high=0.999, log="complement", zero=True)
    assert (decay.place(0), decay.place(0.9), decay.place(0.999)) == (0, pytest.approx(0.15), pytest.approx(1))
    assert decay.place(0.99) == pytest.approx((0.15 + 1) / 2)
    assert decay.marks() == [0, 0.9, 0.99, 0.999]
    assert Axis(type="categorical", choices=("a", "b", "c")).place("b") == 0.5
    assert Axis(type="float", low=2, high=2).place(2) == 0.5


def test_code_in_a_sentence_is_marked_and_the_rest_is_plain() -> None:
    assert page.text("run `a <b>` & go") == "run <code>a &lt;b&gt;</code> &amp; go"
