"""The tables as data, their checks and their texts, from made-up runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tuning import gather, table_page
from tuning.cells import Bench, Wanted, _differs, work
from tuning.entries import Cell, blocks, check_cells, check_disjoint
from tuning.table_words import words
from tuning.tables import Group, Plan, groups, make_plan, rows
from tuning.tracking import Tracker
from wesam.config import Config
from wesam.data import Domain, Split, load_domain
from wesam.errors import InputError
from wesam.methods import METHODS, get_method

DOMAINS = ("camouflaged", "medical")


def cell(group: Group, seed: int, **metrics: float) -> Cell:
    trained = bool(group.row.method)
    tags = {
        "chosen_on": "val" if trained else "nothing", "trials": str(int(trained)), "weights": "w" * 64,
        "data": f"digest of {group.domain}", "mlflow.source.git.commit": "abc", "hardware": "a CPU, 2 cores",
        "memory": "reckoned",
    }  # fmt: skip
    params = {k: str(v) for k, v in group.config.flat().items()}
    return Cell(
        name=f"{group.name} seed {seed}", key=group.key, seed=seed, trained=trained, run_id=f"{group.name}-{seed}",
        params=params, tags=tags, metrics=metrics, ended=1.8e9,
    )  # fmt: skip


def done(plan: Plan, value: Callable[[Group, str, int], float]) -> dict[tuple[str, str, str], list[Cell]]:
    """The cells of a table; value: of a metric of a group with a seed."""
    out = {}
    for g in groups(plan):
        seeds = range(1, plan.seeds + 1) if g.row.method else [0]
        names = [f"test_miou.{k}" for k in g.tests] + [f"test_miou.after_{n}" for n in g.after]
        names += ["parameters", "peak_gib", "seconds_per_step"] if g.cost else []
        out[g.key] = [cell(g, s, **{n: value(g, n, s) for n in names}) for s in seeds]
    return out


SCORES = {"direct": 0.6, "wesam": 0.65, "supervised": 0.7}


def made(group: Group, metric: str, seed: int) -> float:
    return SCORES.get(group.row.key, 0.5) + 0.01 * (seed - 2) * bool(seed)


def test_the_methods_share_data_and_budget_and_drawings_are_made_where_they_can_be() -> None:
    plan = make_plan("methods", DOMAINS, steps=7)
    keys = {row.key: row.prompts for row in rows(plan)}
    assert keys["drawn-box"] == keys["drawn-ellipse"] == ("box",)
    assert (keys["drawn-voronoi"], keys["drawn-polygon"]) == (("point",), ("coarse",))
    assert list(keys)[4:] == ["direct", *METHODS]
    found = groups(plan)
    assert len({g.key for g in found}) == len(found) == 2 * (4 + 3 * len(list(keys)[4:]))
    trained = [g.config.flat() for g in found if g.row.method]
    for path in ("steps", "optim.batch_size", "eval_every", "max_instances", "seed"):
        assert len({c[path] for c in trained}) == 1, path
    assert trained[0]["steps"] == 7
    assert len({c["train"] for c in trained}) > 1, "all else is the method's own"


def test_mean_spread_marks_and_share() -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["wesam", "supervised"])
    (block,) = blocks(plan, done(plan, made))
    (wesam,), (direct,) = block.of("wesam"), block.of("direct")
    assert wesam
    assert direct
    assert (wesam.mean, wesam.spread) == (pytest.approx(0.65), pytest.approx(0.01))
    assert wesam.share == pytest.approx(0.5)
    assert (direct.spread, direct.share) == (None, None)
    names = {block.rows[i].key: mark for (i, _), mark in block.marks().items()}
    assert names == {"wesam": "best", "direct": "second"}, "Supervised learns from masks"
    page = table_page.markdown(plan, done(plan, made))
    assert "| WeSAM | **0.650 ± 0.010** (50 %) |" in page
    assert "| Direct | _0.600_ |" in page
    assert "python -m tuning table methods --domains camouflaged" in page
    for known in ("abc", "digest of camouf", "a CPU, 2 cores", "2027-01-15", "seeds: 1, 2, 3", "w" * 12):
        assert known in page


def test_the_command_names_folders_as_seen_from_here(coco_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(coco_folder.parent)
    plan = make_plan("methods", [str(coco_folder), "shapes+fog:2"], prompts=["box"])
    assert " --domains shapes shapes+fog:2 --model nano " in table_page.command(plan)


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (
            0.57,
            "harm**, more than 2 points below Direct: camouflaged box -3.0 points (0.570 against 0.600).",
        ),
        (0.595, "than its spread over seeds, which may be luck: camouflaged box -0.5 points (spread 1.0)."),
        (0.605, "than its spread over seeds, which may be luck: camouflaged box +0.5 points (spread 1.0)."),
        (0.65, None),
    ],
)
def test_what_is_not_above_direct_is_said_in_words(score: float, said: str | None) -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["wesam"])
    cells = done(plan, lambda g, m, s: score + 0.01 * (s - 2) if g.row.method else 0.6)
    page = table_page.markdown(plan, cells)
    assert "harm" not in page and "luck" not in page if said is None else said in page
    assert "Supervised is not among the methods" in page


def test_what_a_drawing_without_a_model_beats_is_said_in_words() -> None:
    plan = make_plan("methods", DOMAINS, prompts=["box"], methods=["wesam", "supervised"])
    high = {"camouflaged": 0.68, "medical": 0.9}

    def drawn(group: Group, metric: str, seed: int) -> float:
        return high[group.domain] if group.row.drawing == "ellipse" else made(group, metric, seed)

    page = table_page.markdown(plan, done(plan, drawn))
    assert "Ellipse in the box, which needs no model, is above Direct, WeSAM: camouflaged box." in page
    assert "Ellipse in the box, which needs no model, is above all others: medical box." in page
    assert "needs no model, is" not in table_page.markdown(plan, done(plan, made))


def test_one_seed_has_no_spread_and_no_gap_is_said_to_be_none() -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["wesam", "supervised"], seeds=1)
    page = table_page.markdown(plan, done(plan, lambda g, m, s: 0.6))
    assert "One seed each: no spread is known" in page
    assert "Supervised is not above Direct" in page
    assert "±" not in page


def test_of_a_gap_that_is_smaller_than_its_spread_no_share_is_told() -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["wesam", "supervised"])
    for gap, closed in ((0.009, False), (0.02, True)):
        scores = {"direct": 0.6, "wesam": 0.61, "supervised": 0.6 + gap}
        page = table_page.markdown(
            plan, done(plan, lambda g, m, s, known=scores: known.get(g.row.key, 0.5) + 0.01 * (s - 2) * bool(s))
        )  # fmt: skip
        assert ("(50 %)" in page) == closed
        assert ("not above Direct by more than its spread, so there is no gap" in page) != closed


@pytest.mark.parametrize(
    ("model", "published", "crop", "said"),
    [
        ("vit_b", True, 0.0, True),
        ("my_vit_b.pth", True, 0.0, False),
        ("vit_b", False, 0.0, False),
        ("vit_b", True, 2.0, False),
    ],
)
def test_the_papers_values_are_told_where_data_and_weights_are_the_papers(
    model: str, published: bool, crop: float, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box", "point"], methods=["wesam"])
    cells = done(plan, made)
    (block,) = blocks(plan, cells)
    coco = replace(load_domain("camouflaged"), name="coco", published=published)
    monkeypatch.setattr("tuning.table_words.load_domains", lambda names: [coco])
    real = replace(plan, model=model, base=plan.base.replace({"crop": crop}))
    found = [line for line in words(real, [replace(block, domain="coco")], {}) if "in the paper" in line]
    assert [line.partition(":")[0] for line in found] == (["coco box"] if said else [])


def test_a_training_that_val_wants_nothing_of_or_that_diverges_is_said_to_be_one() -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["wesam"], seeds=2)
    cells = done(plan, made)
    first = (found := cells["wesam", "camouflaged", "box"])[0]
    found[0] = replace(first, metrics={**first.metrics, "best_step": 0}, tags={**first.tags, "ended": "diverged"})
    page = table_page.markdown(plan, cells)
    assert "no step was better on val than the model as it is" in page
    assert "with so many seeds: camouflaged box 1 of 2." in page
    assert (
        "Diverged before the last step, and counted with what had been reached: wesam-camouflaged-box seed 1." in page
    )


def test_latex_and_data() -> None:
    plan = make_plan("methods", DOMAINS, prompts=["box"], methods=["wesam", "supervised"])
    cells = done(plan, made)
    text = table_page.latex(plan, cells)
    assert r"WeSAM & \textbf{0.650} {\scriptsize$\pm$0.010} (50\,\%) \\" in text
    assert r"Direct & \underline{0.600} \\" in text
    assert text.count(r"\midrule") == 2
    assert r"\toprule" in text
    assert text.count("{") == text.count("}")
    assert table_page.escaped("a_b & 50 %") == r"a\_b \& 50 \%"
    found = json.loads(json.dumps(table_page.data(plan, cells)))
    entry = next(r for r in found["domains"]["medical"] if r["row"] == "wesam")["entries"]["box"]
    assert entry["values"] == pytest.approx([0.64, 0.65, 0.66])
    assert (entry["mark"], entry["sd"]) == ("best", pytest.approx(0.01))
    assert len(found["cells"]) == sum(len(c) for c in cells.values())
    for written, one in zip(found["cells"], (c for of in cells.values() for c in of), strict=True):
        assert {k: str(v) for k, v in Config().replace(written["config"]).flat().items()} == one.params


def test_losses_are_switched_off_one_by_one_with_and_without_labels() -> None:
    plan = make_plan("losses", ["camouflaged"], prompts=["box"], fixed=["val_prompt=point"])
    found = {g.key: g for g in groups(plan)}
    weights = {k: [found[k, "camouflaged", "box"].config.flat()[f"loss.{n}"] for n in ("anchor", "contrastive")]
               for k in ("self", "self-anchor", "self-contrastive", "all")}  # fmt: skip
    assert [[bool(w) for w in pair] for pair in weights.values()] == [
        [False, False], [True, False], [False, True], [True, True],
    ]  # fmt: skip
    assert found["all", "camouflaged", "grid"].tests == ("point",)
    page = table_page.markdown(plan, done(plan, lambda g, m, s: 0.7 if g.row.key == "all" else 0.65))
    assert "| | box | grid |" in page.replace("|  |", "| |")
    assert "all three, beside self-training alone: camouflaged box +5.0 points; camouflaged grid +5.0 points." in page
    assert (
        "+ anchor, beside self-training alone: camouflaged box no difference; camouflaged grid no difference." in page
    )


def test_who_is_beside_direct_by_less_than_the_spread_is_told_unless_there_is_no_difference() -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["tent", "shot", "supervised"])
    gains = {"tent": 0.0002, "shot": -0.004, "supervised": 0.1}

    def value(g: Group, metric: str, seed: int) -> float:
        return 0.6 + gains.get(g.row.key, 0.0) + 0.01 * (seed - 2) * bool(seed)

    page = table_page.markdown(plan, done(plan, value))
    said = "SHOT is above or below Direct by less than its spread over seeds, which may be luck"
    assert f"{said}: camouflaged box -0.4 points (spread 1.0)." in page
    assert page.count("may be luck") == 1


def test_cross_has_every_prompt_at_test_for_every_one_in_training() -> None:
    plan = make_plan("cross", ["camouflaged"], prompts=["box", "point"])
    assert {g.tests for g in groups(plan)} == {("box", "point")}
    (block,) = blocks(plan, done(plan, lambda g, m, s: 0.6 + 0.1 * (g.prompt in m)))
    assert [[e and round(e.mean, 3) for e in line] for line in block.entries] == [[0.7, 0.6], [0.7, 0.6], [0.6, 0.7]]


def test_modules_have_costs_beside_their_scores() -> None:
    plan = make_plan("modules", ["camouflaged"], prompts=["box", "point"], trials=2)
    for row in rows(plan)[1:]:
        assert any(p.startswith("lora.") for p in plan.space(row, "box")) == ("lora" in plan.config(row, "box").train)
    assert len({plan.config(row, "box") for row in rows(plan)[1:]}) == 8
    page = table_page.markdown(plan, done(plan, lambda g, m, s: 123456 if m == "parameters" else 0.6))
    assert "| lora.targets = qkv | **0.600 ± 0.000** | **0.600 ± 0.000** | 123,456 | 0.60 | 0.600 ± 0.000 |" in page
    assert "(reckoned)" in page
    assert "| train = lora+decoder |" in page


def test_long_says_whether_self_training_decays_and_whether_the_anchor_holds_it() -> None:
    plan = make_plan("long", ["camouflaged"], prompts=["box"], steps=6)
    assert {g.config.steps for g in groups(plan)} == {60}
    assert {g.after for g in groups(plan) if g.row.method} == {(6, 60)}

    def value(g: Group, metric: str, seed: int) -> float:
        if g.row.key == "with-anchor":
            return 0.6 if metric.endswith("_6") else 0.65
        return 0.5 if metric.endswith("_60") else 0.65

    page = table_page.markdown(plan, done(plan, value))
    assert (
        "camouflaged box: with the anchor loss self-training does not decay: no difference from the step that is best "
        "on val to the last one, +5.0 points from the usual number of steps."
    ) in page
    assert "without the anchor loss self-training decays: -15.0 points from the step that is best on val" in page
    assert "after the last step the anchor loss makes +15.0 points" in page
    assert "| box, best on val | box, after 6 steps | box, after 60 steps |" in page
    cells = done(plan, value)
    first = cells[key := ("without-anchor", "camouflaged", "box")][0]
    cells[key][0] = replace(first, metrics={k: v for k, v in first.metrics.items() if not k.endswith("_60")})
    assert check_cells(plan, groups(plan), cells) == [f"{first.name}: it was not scored after 60 steps"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tags": {"chosen_on": "test"}}, "it was chosen on test, not on val"),
        ({"tags": {"chosen_on": ""}}, "not on val"),
        ({"tags": {"trials": "9"}}, r"its trials \(9\) are not those of most cells \(1\)"),
        ({"tags": {"data": "other"}}, r"its data \(other\)"),
        ({"tags": {"weights": "other"}}, r"its weights \(other\)"),
        ({"params": {"steps": "61"}}, r"its steps \(61\) are not those of most cells \(60\)"),
        ({"params": {"optim.batch_size": "8"}}, r"its images a step \(8\)"),
        ({"params": {"test_instances": "9"}}, r"its instances of an image on test \(9\) .* most cells \(0\)"),
    ],
)
def test_a_cell_with_another_budget_or_chosen_on_test_is_named(change: dict[str, Any], message: str) -> None:
    plan = make_plan("methods", ["camouflaged"], prompts=["box"], seeds=2)
    cells = done(plan, made)
    assert check_cells(plan, groups(plan), cells) == []
    key = ("wesam", "camouflaged", "box")
    first = cells[key][0]
    cells[key][0] = replace(first, **{k: {**getattr(first, k), **v} for k, v in change.items()})
    (fault,) = check_cells(plan, groups(plan), cells)
    assert fault.startswith("wesam-camouflaged-box seed 1: ")
    with pytest.raises(InputError, match=message):
        raise InputError(fault)
    del cells[key][0]
    assert check_cells(plan, groups(plan), cells) == ["wesam-camouflaged-box: it has the seeds 2, not 1, 2"]


def test_a_run_that_is_older_than_a_hyperparameter_had_its_published_value() -> None:
    def wanted(*fixed: str) -> tuple[Bench, Wanted]:
        plan = make_plan("methods", ["camouflaged"], prompts=["box"], methods=["wesam"], fixed=fixed)
        group = groups(plan)[-1]
        return Bench(plan, "w", 1, 0.0), Wanted(group=group, config=group.config, number=1)

    bench, cell = wanted()
    params = bench.params(cell)
    del params["test_instances"]
    run: Any = SimpleNamespace(data=SimpleNamespace(params=params, tags=bench.tags(cell)))
    assert _differs(bench, cell, run) is None
    for path in ("test_instances", "optim.lr"):
        assert _differs(*wanted(f"{path}=1"), run) == path


def test_an_image_on_val_and_on_test_is_found() -> None:
    domain = load_domain("camouflaged")
    val, test = domain.split("val"), domain.split("test")
    mixed = Split(3, lambda i: val[1] if i == 2 else test[i])
    assert check_disjoint([domain]) == []
    both = Domain("mixed", {"train": val, "val": val, "test": mixed}, "x")
    (fault,) = check_disjoint([both])
    assert fault == "mixed: val and test share 1 image, camouflaged/val/1 is camouflaged/val/1"


def test_a_search_begins_with_the_defaults_is_chosen_on_val_and_finds_its_trials_again() -> None:
    plan = make_plan("methods", ["camouflaged"], methods=["wesam"], trials=6, seeds=2, fixed=["lora.targets=qkv"])
    group = next(g for g in groups(plan) if g.row.method)
    for prompt in plan.prompts:
        space = set(plan.space(group.row, prompt))
        assert space <= {*get_method("wesam").searched} - {"lora.targets"}
        assert ("loss.tightness" in space) == (prompt == "box")

    def play(weight: float = 10.0) -> tuple[list[Wanted], list[Wanted]]:
        going, tried = work(plan, group), []
        asked = next(going)
        while asked[0].trial:
            (one,) = asked
            tried.append(one)
            asked = going.send([cell(group, one.number, best_val=-weight * abs(one.config.optim.lr - 0.002))])
        return tried, asked

    tried, last = play()
    assert [t.number for t in tried] == [1, 2, 3, 4, 5, 6]
    assert tried[0].config == group.config
    assert {t.tests for t in tried} == {()}, "a trial does not see test"
    best = min(tried, key=lambda t: abs(t.config.optim.lr - 0.002))
    assert [(w.config.seed, w.number, w.config.replace({"seed": 0})) for w in last] == [
        (1, 1, best.config), (2, 2, best.config),
    ]  # fmt: skip
    assert [t.config for t in play()[0]] == [t.config for t in tried]
    _, last = play(weight=1e-3)
    assert last[0].config.replace({"seed": 0}) == group.config, "what is as good but for a tenth of a point is the same"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "method"}, "unknown table 'method': did you mean 'methods'"),
        ({"methods": ["wesm"]}, "did you mean 'wesam'"),
        ({"prompts": ["bax"]}, "did you mean 'box'"),
        ({"prompts": ["grid"]}, "no label that a person gives"),
        ({"kind": "losses", "methods": ["supervised"]}, "of wesam alone"),
        ({"kind": "losses", "fixed": ["loss.anchor=1"]}, "the rows of the table losses differ in it"),
        ({"fixed": ["seed=1"]}, "seed is an option of its own"),
        ({"methods": ["tent"], "fixed": ["loss.label=1"]}, "loss.label has no effect on tent: it is for wesam+"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"domains": ["clan"]}, "unknown domain 'clan'"),
        ({"name": "a/b"}, "--name 'a/b'"),
    ],
)
def test_what_cannot_be_run_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        make_plan(**{"kind": "methods", "domains": ["clean"], **given})
    assert message in str(refused.value)


def test_a_store_that_takes_no_table_is_told_in_a_line(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker.start("t", "table", None, {})
    tracker.flush()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker.client, "log_artifacts", full)
    monkeypatch.setattr(tracker, "_stuck", True)  # it has been tried again and again before
    with pytest.raises(InputError, match=r"the table is written, but .*No space left"):
        gather.keep(tracker, "t", {"t.md": "a table"})
