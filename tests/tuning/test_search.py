"""Who proposes trials and who stops them, without a cluster."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tuning import sampler
from tuning.budget import Budget
from tuning.confirm import Confirmation, finalists, winner
from tuning.listener import Listener
from tuning.places import Place, Places
from tuning.plan import REFERENCES, Plan, make_plan, shown
from tuning.proposals import near, propose
from tuning.replay import _NOTHING_RUNS, Past, Replayed, _Trial, replay, tell
from tuning.sampler import (
    ask,
    catch_up,
    decoded,
    distributions,
    encoded,
    ended,
    enqueue,
    open_storage,
    open_study,
    startup,
)  # fmt: skip
from tuning.schedulers import make_scheduler
from tuning.search import Search
from tuning.space import DEFAULT, Axis
from tuning.tracking import Trial
from wesam import Config
from wesam.errors import InputError
from wesam.sam import random_sam, write_weights

DIRECT = 0.5
"""The score of the model as it is."""


def make(tmp_path: Path, method: str = "wesam", **settings: Any) -> Plan:
    """A plan of the paper's method, whose space holds both references."""
    given = {"domains": ["camouflaged"], "steps": 8, "trials": 6, "storage": str(tmp_path), "name": "s"}
    return make_plan({**given, **settings}, ["eval_every=2", f"method={method}"])


def alone() -> Place:
    return Places(9, ["camouflaged"]).of("camouflaged")


def begin(plan: Plan, **changed: Any) -> tuple[Search, optuna.Study, dict[str, str]]:
    study = open_study(plan, "camouflaged", open_storage(plan.optuna_url()))
    enqueue(study, plan, ())
    stopped: dict[str, str] = {}
    outside = [r for r in REFERENCES if plan.point(r) is None]
    given: dict[str, Any] = {
        "numbers": range(1, 100), "references": outside, "unfinished": (), "budget": Budget(plan),
        "confirmation": Confirmation(plan, 0.4, {}, {}, (), supervised=True), "place": alone(),
    }  # fmt: skip
    return Search(plan, study, stopped=stopped, **{**given, **changed}), study, stopped


def result(score: float, step: int, **more: Any) -> dict[str, Any]:
    return {"best_score": score, "step": step, "training_iteration": step, "last": step == 8, **more}


def test_the_references_come_first_and_then_points_of_the_space(tmp_path: Path) -> None:
    plan = make(tmp_path)
    search, _, _ = begin(plan)
    first, second = search.suggest("a"), search.suggest("b")
    assert [(p["number"], p["reference"]) for p in (first, second)] == [(1, "paper"), (2, "defaults")]
    assert first["config"] == plan.config("paper", {}).flat()
    assert second["config"] == plan.base.flat()
    for name, score in (("a", 0.5), ("b", 0.6)):
        search.on_trial_result(name, result(score, 8))
        search.on_trial_complete(name, result(score, 8))
    proposal = search.suggest("c")
    assert "reference" not in proposal
    assert set(proposal["point"]) == set(plan.space)
    assert all(plan.space[p].holds(v) for p, v in proposal["point"].items())
    assert proposal["config"] == plan.config(None, proposal["point"]).flat()


def test_the_papers_hyperparameters_are_of_the_papers_method(tmp_path: Path) -> None:
    search, study, _ = begin(make(tmp_path, method="wesam+"))
    first, second = search.suggest("a"), search.suggest("b")
    assert (first["config"]["method"], second["config"]["method"]) == ("wesam", "wesam+")
    assert "optuna" not in first, "no point of a space of another method"
    assert len([t for t in study.trials if t.state != TrialState.WAITING]) == 1


def test_the_methods_bolder_start_follows_the_references(tmp_path: Path) -> None:
    search, _, _ = begin(make(tmp_path, method="wesam+"))
    third, fourth = [search.suggest(str(i)) for i in range(4)][2:]
    assert (third["label"], fourth["label"]) == (sampler.BOLDER, sampler.SEARCHED)
    assert "reference" not in third
    assert third["config"]["lora.targets"] == "encoder+decoder"
    search, _, _ = begin(make(tmp_path, name="other", method="wesam"))
    assert [search.suggest(str(i))["label"] for i in range(3)][-1] == sampler.SEARCHED


def test_a_reference_that_has_failed_comes_first_when_the_study_goes_on(tmp_path: Path) -> None:
    plan = make(tmp_path)
    search, study, _ = begin(plan)
    search.suggest("a")
    search.on_trial_complete("a", error=True)
    enqueue(study, plan, ())
    nothing = Confirmation(plan, 0.4, {}, {}, (), supervised=True)
    again = Search(plan, study, range(1, 5), (), (), nothing, Budget(plan), {}, alone())
    proposals = [again.suggest(name) for name in "abcd"]
    assert {p.get("reference") for p in proposals[:2]} == set(REFERENCES)
    assert [p["label"] for p in proposals[2:]] == [sampler.SEARCHED, sampler.SEARCHED]


def test_what_was_killed_before_its_first_checkpoint_is_tried_again(tmp_path: Path) -> None:
    plan = replace(make(tmp_path, method="wesam+"), warm=(("other/cells", Config().flat()),))
    search, study, _ = begin(plan)
    labels = [search.suggest(name)["label"] for name in "abcd"]
    assert labels[2:] == [f"{sampler.BEST_OF}other/cells", sampler.BOLDER]
    search.on_trial_complete("a", result(0.5, 8))
    catch_up(study, plan, [], ())
    enqueue(study, plan, [name for t in ended(study, plan).values() for name in sampler.named(t.user_attrs)])
    nothing = Confirmation(plan, 0.4, {}, {}, (), supervised=True)
    again = Search(plan, study, range(5, 9), (), (), nothing, Budget(plan), {}, alone())
    assert [again.suggest(name)["label"] for name in "abcd"] == [*labels[1:], sampler.SEARCHED]


def test_a_driver_that_is_killed_while_it_begins_a_trial_leaves_a_study_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make(tmp_path)
    study = open_study(plan, "camouflaged", open_storage(plan.optuna_url()))
    for name in ("set_trial_user_attr", "set_trial_param", "set_trial_state_values"):
        enqueue(study, plan, ())
        with monkeypatch.context() as patch:
            patch.setattr(study._storage, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                propose(study, plan, 1)
        catch_up(study, plan, [], ())
        enqueue(study, plan, ())
    assert propose(study, plan, 1)[2]["reference"] == "paper"
    assert [t.user_attrs["number"] for t in sampler.running(study, plan).values()] == [1]


def interrupted(*given: Any) -> None:
    raise KeyboardInterrupt


def test_the_sampler_leaves_what_another_study_has_queued(tmp_path: Path) -> None:
    mine = make(tmp_path, optuna_study="shared", optuna=f"sqlite:///{tmp_path}/o.db")
    search, study, _ = begin(mine)
    for i in range(13):
        search.suggest(str(i))
        search.on_trial_complete(str(i), result(0.5, 8))
    enqueue(study, replace(mine, name="other"), ())
    assert near(study.trials, mine, 15) is None, "it is the sampler's turn"
    propose(study, mine, 15)
    queue = [t for t in study.trials if t.user_attrs["study"] == "other"]
    assert [t.user_attrs["reference"] for t in queue] == list(REFERENCES)
    assert {t.state for t in queue} == {TrialState.WAITING}


def test_trials_go_on_near_the_best_one_until_the_sampler_takes_turns(tmp_path: Path) -> None:
    plan = make(tmp_path, trials=12)
    search, study, _ = begin(plan)
    points = []
    for i in range(6):
        points.append(search.suggest(str(i))["point"])
        score = 0.9 if i == 2 else 0.5  # the third, with box aids, stays the best
        search.on_trial_complete(str(i), result(score, 8))
    assert decoded(plan.space, study.trials[2].params) == points[2]
    for point in points[3:]:
        moved = [p for p in plan.space if point[p] != points[2][p]]
        assert 1 <= len(moved) <= 9
        assert all(plan.space[p].holds(v) for p, v in point.items())
    turns = [near(study.trials, plan, startup(plan) + n) is not None for n in range(3)]
    assert turns in ([True, False, True], [False, True, False]), "the sampler's turn is each second time"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
def test_every_sampler_proposes_what_lies_in_the_space(sampler: str, tmp_path: Path) -> None:
    plan = make(tmp_path, sampler=sampler, trials=8)
    search, study, _ = begin(plan)
    for i in range(9):
        point = search.suggest(str(i))["point"]
        assert all(plan.space[p].holds(v) for p, v in point.items()), point
        search.on_trial_result(str(i), result(0.5 + 0.01 * i, 4))
        search.on_trial_complete(str(i), result(0.5 + 0.01 * i, 8))
    assert len({str(t.params) for t in study.trials}) == 9


def test_of_many_trials_tpe_sees_the_best_the_last_and_those_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make(tmp_path)
    search, study, _ = begin(plan)
    monkeypatch.setattr(sampler, "BEST", 2)
    monkeypatch.setattr(sampler, "RECENT", 3)
    scores = [0.5, 0.9, 0.6, 0.8, 0.7, 0.4, 0.3, 0.2]
    for i, score in enumerate(scores):
        search.suggest(str(i))
        if i != 2:
            search.on_trial_complete(str(i), result(score, 8))
    split, seen = optuna.samplers._tpe.sampler._split_trials, []

    def split_and_seen(study: Any, trials: Any, *more: Any) -> Any:
        seen.append([t.number for t in trials])
        return split(study, trials, *more)

    monkeypatch.setattr(optuna.samplers._tpe.sampler, "_split_trials", split_and_seen)
    propose(study, plan, 21)  # the sampler's turn
    assert seen[-1] == [1, 2, 3, 5, 6, 7]
    assert len(study.get_trials()) == len(scores) + 1


def test_costs_are_made_small_as_well(tmp_path: Path) -> None:
    plan = make(tmp_path, minimize=["size", "seconds"])
    search, study, stopped = begin(plan)
    for i in range(7):
        search.suggest(str(i))
        search.on_trial_result(str(i), result(0.5, 4, size=1.0, seconds=2.0))
        stopped[str(i)] = "pruned"
        search.on_trial_complete(str(i), result(0.5, 4, size=1.0, seconds=2.0))
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert study.trials[0].values == [0.5, 1.0, 2.0]
    with pytest.raises(InputError, match="--minimize needs the sampler"):
        make(tmp_path, minimize=["size"], sampler="gp")


def test_optuna_is_told_how_each_trial_ended(tmp_path: Path) -> None:
    search, study, stopped = begin(make(tmp_path))
    for name in "abcdef":
        search.suggest(name)
    search.on_trial_result("a", result(0.4, 4))
    search.on_trial_result("a", result(0.5, 8))
    search.on_trial_complete("a", result(0.5, 8))
    stopped["b"] = "pruned"
    search.on_trial_complete("b", result(0.2, 4))
    stopped["f"] = "plateau"
    search.on_trial_complete("f", result(0.6, 4))
    search.on_trial_complete("c", result(0.3, 4))  # neither at its end nor stopped: it has diverged
    search.on_trial_complete("d", {"done": True})  # nothing was reported at all
    search.on_trial_complete("e", error=True)
    states = [t.state for t in study.trials[:6]]
    assert states == [
        TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE
    ]  # fmt: skip
    assert study.trials[5].value == 0.6
    assert study.trials[0].intermediate_values == {4: 0.4, 8: 0.5}
    assert study.trials[1].intermediate_values == {4: 0.2}
    assert study.trials[0].user_attrs == {"study": "s", "number": 1, "reference": "paper"}


def test_several_studies_can_share_one_of_optunas_if_they_search_the_same(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    one = make(tmp_path, name="one", optuna=url, optuna_study="both")
    two = make(tmp_path, name="two", optuna=url, optuna_study="both")
    first, study, _ = begin(one)
    second, _, _ = begin(two)
    for i, search in enumerate((first, second, first, second)):
        search.suggest(str(i))
        search.on_trial_complete(str(i), result(0.5, 8))
    assert {t.user_attrs["study"] for t in study.trials if t.state == TrialState.COMPLETE} == {"one", "two"}
    with pytest.raises(InputError, match="'both-camouflaged' exists with another space"):
        begin(make(tmp_path, optuna=url, optuna_study="both", space={"lora.rank": 4}))


def test_nsga2_breeds_from_what_has_come_before(tmp_path: Path) -> None:
    search, study, _ = begin(make(tmp_path, sampler="nsga2", trials=16))
    for n in range(16):
        search.suggest(str(n))
        search.on_trial_complete(str(n), result(0.01 * n, 8))
    generations = [t.system_attrs.get("NSGAIISampler:generation") for t in study.trials]
    assert generations[:2] == [None, None], "the references"
    assert max(g for g in generations if g is not None) > 1


def test_each_of_several_studies_begins_with_its_own_references(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    searches = [begin(make(tmp_path, name=name, optuna=url, optuna_study="both"))[0] for name in ("one", "two")]
    found = [searches[i].suggest(f"{i} {n}") for n in range(2) for i in (1, 0)]
    assert [f["reference"] for f in found] == ["paper", "paper", "defaults", "defaults"]


def test_a_study_is_not_taken_for_one_of_its_name_that_mlflow_has_forgotten(tmp_path: Path) -> None:
    plan = replace(make(tmp_path), run="before")
    search, study, _ = begin(plan)
    for name in "abc":
        search.suggest(name)
        search.on_trial_complete(name, result(0.5, 8))
    again, _, _ = begin(replace(plan, run="now"))
    assert [again.suggest(name)["reference"] for name in "de"] == ["paper", "defaults"], "not what was lost"
    assert len(ended(study, plan)) == 3
    for changes, what in (({"steps": 16}, "steps"), ({"crop": 2}, "crop")):
        with pytest.raises(InputError, match=f"exists with another {what}"):
            begin(make(tmp_path, **changes))  # type: ignore[arg-type]
    storage = open_storage(plan.optuna_url())
    open_study(plan, "medical", storage, "digest")
    with pytest.raises(InputError, match="exists with another data"):
        open_study(plan, "medical", storage, "another")
    write_weights(random_sam("nano"), own := tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="exists with another weights"):
        open_study(replace(plan, model=str(own)), "medical", storage, "digest")
    older = open_study(plan, "medical", storage, "digest")
    about = {k: v for k, v in older.user_attrs["about"].items() if k != "weights"}
    older.set_user_attr("about", {**about, "model": plan.model})
    open_study(plan, "medical", storage, "digest")
    with pytest.raises(InputError, match="exists with another model"):
        open_study(replace(plan, model=str(own)), "medical", storage, "digest")


@pytest.mark.parametrize(
    "url", ["sqlite:////dev/null/x.db", "nonsense", "postgresql://127.0.0.1:9/x", "mysql+nonsense://x"]
)
def test_a_storage_that_cannot_be_reached_is_one_line(url: str) -> None:
    with pytest.raises(InputError, match=r"Optuna storage|needs a package") as e:
        open_storage(url)
    assert "\n" not in str(e.value)


def test_a_password_is_not_told() -> None:
    assert shown("postgresql://me:sec/ret@host/db") == "postgresql://me:***@host/db"
    assert shown("postgresql://me:123/abc@host/db") == "postgresql://me:***@host/db"
    assert shown("http://host:5000?x=a@b") == "http://host:5000?x=a@b"
    assert shown("https://me:sec/ret@host/x") == "https://me:***@host/x"
    assert shown("postgresql://host/db?user=me&password=secret&x=1") == "postgresql://host/db?user=me&password=***&x=1"
    assert shown("sqlite:////home/me/optuna.db") == "sqlite:////home/me/optuna.db"
    assert shown("http://host:8000/cells@70/10/20") == "http://host:8000/cells@70/10/20"
    assert shown("at http://me@corp.com:secret@host:5000/x.") == "at http://me@corp.com:***@host:5000/x."
    assert shown("http://me:sec@ret@host http://you:secret@host") == "http://me:***@host http://you:***@host"
    assert shown("x://h/db?sslpassword=secret&PWD=secret#a") == "x://h/db?sslpassword=***&PWD=***"
    with pytest.raises(InputError) as e:
        open_storage("mysql+nonsense://me:secret@host/x")
    assert "secret" not in str(e.value)


def test_an_interrupted_study_goes_on_in_optuna(tmp_path: Path) -> None:
    """A finished trial that Optuna has missed is told, one that is gone on with stays, one that is lost has failed."""
    plan = make(tmp_path)
    search, study, _ = begin(plan)
    proposals = [search.suggest(str(i)) for i in range(3)]
    search.on_trial_complete("0", result(0.5, 8))
    done = Trial(
        number=7, run_id="", label="searched", reference=None, point=proposals[2]["point"], config={}, best=0.7,
        best_step=8, step=8, ended="finished", gap=None, metrics={},
    )  # fmt: skip
    unfinished = {**proposals[1], "run": "r", "resume": "path", "state": {}}
    catch_up(study, plan, [done], [unfinished])
    enqueue(study, plan, REFERENCES)
    states = {t.user_attrs.get("number"): t.state for t in study.trials}
    assert states[1] == TrialState.COMPLETE
    assert states[2] == TrialState.RUNNING
    assert states[3] == TrialState.FAIL
    assert states[7] == TrialState.COMPLETE
    confirmation = Confirmation(plan, 0.4, {}, {}, (), supervised=False)
    again = Search(plan, study, range(8, 10), (), [unfinished], confirmation, Budget(plan), {}, alone())
    assert again.suggest("x") == unfinished
    again.on_trial_result("x", result(0.6, 8))
    again.on_trial_complete("x", result(0.6, 8))
    assert study.trials[1].value == 0.6
    assert again.suggest("y")["number"] == 8


def test_optuna_hears_of_what_the_budget_had_cut_and_has_gone_on_since(tmp_path: Path) -> None:
    plan = make(tmp_path)
    search, study, stopped = begin(plan)
    proposal = search.suggest("a")
    stopped["a"] = "budget"
    search.on_trial_complete("a", {**result(0.5, 4), "last": False})
    done = Trial(
        number=proposal["number"], run_id="", label="", reference="paper", point=proposal["point"], config={}, best=0.9,
        best_step=8, step=8, ended="budget", gap=None, metrics={},
    )  # fmt: skip
    for ended_by, value in (("budget", 0.5), ("finished", 0.9), ("finished", 0.9)):
        catch_up(study, plan, [replace(done, ended=ended_by)], ())
        assert ended(study, plan)[proposal["number"]].value == value
    assert len(study.trials) == 3, "two references were queued"


def test_a_trial_that_was_killed_after_its_last_step_is_confirmed_as_others_are(tmp_path: Path) -> None:
    plan = make(tmp_path)
    search, study, _ = begin(plan)
    proposals = [search.suggest(str(i)) for i in range(3)]
    scores = {p["number"]: (0.6, p["config"]) for p in proposals[:2]}
    confirmation = Confirmation(plan, 0.4, scores, {}, (), supervised=False)
    state = {"step": 8, "best": 0.7, "best_step": 8}
    unfinished = {**proposals[2], "run": "r", "resume": "path", "state": state}
    again = Search(plan, study, (), (), [unfinished], confirmation, Budget(plan), {}, alone())
    again.suggest("x")
    again.on_trial_complete("x", {})  # there was no step left that it could have reported
    assert again.suggest("y")["of"] == 3


def test_an_interrupted_study_goes_on_without_the_database_of_before(tmp_path: Path) -> None:
    plan = make(tmp_path)
    search, _, _ = begin(plan)
    proposals = [search.suggest(str(i)) for i in range(2)]
    unfinished = {**proposals[1], "run": "r", "resume": "path", "state": {}}
    plan = make(tmp_path, optuna=f"sqlite:///{tmp_path}/new.db")
    study = open_study(plan, "camouflaged", open_storage(plan.optuna_url()))
    catch_up(study, plan, [], [unfinished])
    nothing = Confirmation(plan, 0.4, {}, {}, (), supervised=True)
    again = Search(plan, study, range(3, 5), (), [unfinished], nothing, Budget(plan), {}, alone())
    assert again.suggest("x") == unfinished
    again.on_trial_complete("x", result(0.6, 8))
    (known,) = study.trials
    assert (known.state, known.value) == (TrialState.COMPLETE, 0.6)
    assert decoded(plan.space, known.params) == unfinished["point"]


def test_a_trial_of_which_mlflow_knows_nothing_is_run_again_as_it_was(tmp_path: Path) -> None:
    """Its driver was killed after Optuna had been told of its end, and before MLflow had heard of it."""
    plan = make(tmp_path)
    search, study, _ = begin(plan)
    proposals = [search.suggest(name) for name in "abc"]
    for name in "abc":
        search.on_trial_complete(name, result(0.5, 8))
    before = [t.number for t in study.trials if t.state == TrialState.COMPLETE]
    nothing = Confirmation(plan, 0.4, {}, {}, (), supervised=True)
    again = Search(plan, study, [2, 3, 4], (), (), nothing, Budget(plan), {}, alone())
    assert [again.suggest(name) for name in "de"] == proposals[1:]
    for name in "de":
        again.on_trial_result(name, result(0.5, 8))
        again.on_trial_complete(name, result(0.5, 8))
    assert [t.number for t in study.trials if t.state == TrialState.COMPLETE] == before, "told once"
    assert again.suggest("f")["optuna"] > max(before)


def test_a_budget_that_is_spent_ends_the_search(tmp_path: Path) -> None:
    plan = make(tmp_path, gpu_hours=1e-13, hours=1.0)
    budget = Budget(plan)
    search, _, _ = begin(plan, budget=budget)
    assert search.suggest("a")["number"] == 1
    budget.begin("camouflaged", "a")
    assert budget.over()
    assert search.suggest("b")["role"] == "supervised", "the budget is the search's"
    scheduler = make_scheduler(plan, budget, 0.0)
    trial: Any = SimpleNamespace(trial_id="a", config={"reference": "paper"})
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, result(0.5, 2)) == TrialScheduler.STOP
    assert scheduler.stopped == {"a": "budget"}
    assert budget.end("camouflaged", "a") > 0
    assert budget.gpu_hours() == pytest.approx(budget.gpu_hours()), "nothing runs, nothing is spent"
    assert Budget(make(tmp_path, hours=1e-13)).over()
    assert Budget(make(tmp_path, hours=9.0), before=9.0).over()
    assert not Budget(make(tmp_path, hours=9.0), before=8.0).over(), "an hour is left"
    assert not Budget(make(tmp_path)).over()


def test_a_trial_that_waits_for_another_worker_spends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    budget = Budget(make(tmp_path))
    monkeypatch.setattr("tuning.budget.time.monotonic", lambda: 3600 * now[0])
    seen: Any = SimpleNamespace(hours=0.0)
    listener: Any = SimpleNamespace(
        _seen={"a": seen}, _budget=budget, _domain=SimpleNamespace(name="d"), _place=SimpleNamespace(begun=lambda: None)
    )
    trial: Any = SimpleNamespace(trial_id="a", config={})
    Listener.on_trial_start(listener, 0, [], trial)
    now[0] = 1.0
    Listener.on_trial_recover(listener, 0, [], SimpleNamespace(trial_id="lost while it was being started"))  # type: ignore[arg-type]
    Listener.on_trial_recover(listener, 0, [], trial)
    now[0] = 10.0
    assert seen.hours + budget.of("d", "a") == 1.0
    Listener.on_trial_start(listener, 0, [], trial)
    now[0] = 11.0
    assert seen.hours + budget.end("d", "a") == 2.0
    assert budget.gpu_hours() == 2.0


def test_the_budget_is_the_searchs_and_interrupted_trials_have_cost_something(tmp_path: Path) -> None:
    budget = Budget(make(tmp_path, gpu_hours=1.0), 0.5, 9.0, share=0.25)
    assert not budget.over()
    assert budget.gpu_hours() == 9.5
    budget.begin("d", "supervised", search=False)
    budget.begin("d", "trial")
    assert 0 < budget.of("d", "trial") <= budget.end("d", "trial")
    assert budget.gpu_hours(search=True) > 0.5
    assert budget.end("d", "supervised") > 0
    assert not budget.over()
    assert Budget(make(tmp_path, gpu_hours=1.0), 1.0).over()


def test_the_winner_is_trained_again_when_the_search_has_ended_and_supervised_beside_it(tmp_path: Path) -> None:
    plan = make(tmp_path, seeds=2, seed=5)
    search, _, _ = begin(plan, numbers=range(1, 4))
    found = [search.suggest(name) for name in "abc"]
    beside = [search.suggest(name) for name in "de"]
    assert [(p["role"], p["number"], p["config"]["method"]) for p in beside] == [
        ("supervised", 6, "supervised"), ("supervised", 7, "supervised")
    ]  # fmt: skip
    assert search.suggest("f") is None, "nobody knows who wins"
    search.on_trial_complete("a", result(0.5, 8))
    search.on_trial_complete("b", result(0.6, 4))
    search.on_trial_complete("d", result(0.9, 8))
    assert search.suggest("f") is None
    search.on_trial_complete("c", error=True)
    again = [search.suggest(name) for name in "fg"]
    assert [(p["role"], p["number"], p["of"]) for p in again] == [("seed", 6, 2), ("seed", 7, 2)]
    assert again[0]["config"] == {**found[1]["config"], "seed": 6}
    assert search.suggest("h") == Searcher.FINISHED


def test_trials_nearly_as_good_are_trained_again_before_one_is_chosen(tmp_path: Path) -> None:
    """With one seed more than the winner gets afterwards: those scores have chosen nothing."""
    plan = make(tmp_path, seeds=2, seed=5)
    search, _, _ = begin(plan, numbers=range(1, 5))
    found = {name: search.suggest(name) for name in "abcd"}
    for name, score in zip("abcd", (0.695, 0.70, 0.68, 0.698), strict=True):
        search.on_trial_complete(name, result(score, 8))
    final = [search.suggest(name) for name in "efg"]
    assert [(p["role"], p["number"], p["of"]) for p in final] == [
        ("finalist", 8, 2), ("finalist", 8, 4), ("finalist", 8, 1)
    ]  # fmt: skip
    assert final[1]["config"] == {**found["d"]["config"], "seed": 8}
    search.on_trial_complete("e", result(0.68, 8))
    search.on_trial_complete("f", error=True)
    assert [search.suggest(name)["role"] for name in "hi"] == ["supervised"] * 2, "while a finalist runs"
    assert search.suggest("j") is None
    search.on_trial_complete("g", result(0.70, 8))
    again = [search.suggest(name) for name in "jk"]
    assert [(p["role"], p["number"], p["of"]) for p in again] == [("seed", 6, 1), ("seed", 7, 1)]
    assert search.suggest("l") == Searcher.FINISHED


def test_what_has_been_confirmed_is_not_confirmed_again(tmp_path: Path) -> None:
    plan = make(tmp_path, seeds=2)
    known = {1: (0.595, plan.base.flat()), 2: (0.6, plan.base.flat()), 3: (0.599, plan.base.flat())}
    done = [("supervised", 1, None), ("seed", 1, 2), ("seed", 2, 1), ("finalist", 3, 2), ("finalist", 3, 1)]
    confirmation = Confirmation(plan, 0.4, known, {2: 0.6, 1: 0.59}, done, supervised=True)
    assert confirmation.most == 6
    proposals = [confirmation.next(waiting=waiting) for waiting in (True, False, False, False)]
    assert [p and (p["role"], p["number"], p["of"]) for p in proposals] == [
        ("supervised", 2, None), ("finalist", 3, 3), ("seed", 2, 2), None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({1: 0.70, 2: 0.695, 3: 0.6895, 4: 0.71}, [4, 1]),
        ({1: 0.705, 2: 0.709, 3: 0.71, 4: 0.709, 5: 0.709}, [3, 2, 4]),
        ({1: 0.65, 2: 0.60}, []),
        ({1: 0.6004, 2: 0.6005}, []),
        ({1: 0.6004, 2: 0.608}, []),
        ({}, []),
    ],
    ids=["within a point", "three at most", "one alone", "none better than Direct", "one better than Direct", "none"],
)
def test_who_could_be_the_best(scores: dict[int, float], expected: list[int]) -> None:
    assert finalists(scores, 0.6) == expected


def test_a_winner_must_beat_direct() -> None:
    assert winner({1: 0.5, 3: 0.7, 2: 0.7}, {}, 0.6) == 2
    assert winner({1: 0.5, 2: 0.7, 3: 0.7005}, {}, 0.6) == 2, "the first of those that are as good"
    assert winner({1: 0.5, 2: 0.7, 3: 0.7015}, {}, 0.6) == 3
    assert winner({1: 0.5, 2: 0.6004}, {}, 0.6) is None
    assert winner({1: 0.6004, 2: 0.6014}, {}, 0.6) == 2
    assert winner({}, {}, 0.6) is None
    confirmation = Confirmation(make_plan({"domains": ["camouflaged"]}, []), 0.6, {}, {}, (), supervised=False)
    confirmation.learn({"number": 1, "config": {}}, 0.6)
    assert confirmation.next(waiting=False) is None


def test_of_finalists_the_mean_decides() -> None:
    scores = {1: 0.70, 2: 0.708, 3: 0.71}
    assert winner(scores, {1: 0.70, 2: 0.704, 3: 0.69}, 0.6) == 2
    assert winner(scores, {1: 0.70, 3: 0.70}, 0.6) == 3, "one whose second training failed cannot win"
    assert winner(scores, {1: 0.51, 3: 0.50}, 0.6) == 1
    assert winner({**scores, 4: 0.73}, {1: 0.70, 3: 0.70}, 0.6) == 4, "found when the study was enlarged"
    assert winner(scores, {1: 0.49, 3: 0.48}, 0.6) is None, "on the mean Direct is better"


def test_a_point_is_the_same_after_optuna(tmp_path: Path) -> None:
    plan = make(tmp_path)
    study = optuna.create_study()
    generator = random.Random(0)
    for _ in range(20):
        point = {path: axis.at(generator.random()) for path, axis in plan.space.items()}
        assert set(encoded(plan.space, point)) == set(distributions(plan.space, point))
        study.enqueue_trial(encoded(plan.space, point))
        again = ask(study.ask(), plan.space)
        for path, value in point.items():
            assert again[path] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), path


def test_places_fill_an_axis_to_its_ends() -> None:
    places = [n / 100 for n in range(-10, 111)]
    assert {Axis(type="int", low=1, high=4, log=True).at(p) for p in places} == {1, 2, 3, 4}
    assert {Axis(type="categorical", choices=(False, True)).at(p) for p in places} == {False, True}
    rates = Axis(type="float", low=1e-4, high=1.0, log=True)
    assert [rates.at(p) for p in (-1, 0, 0.5, 1, 2)] == [pytest.approx(v) for v in (1e-4, 1e-4, 1e-2, 1, 1)]
    decays = [float(DEFAULT["teacher.decay"].at(p)) for p in places]
    assert all(d == 0 or 0.9 <= d <= 0.9999 for d in decays)
    assert {0, 0.9, 0.9999} <= {round(d, 9) for d in decays}
    for axis in DEFAULT.values():
        for value in axis.marks():
            again = axis.at(axis.place(value))
            assert again == (value if axis.type == "categorical" else pytest.approx(value))


def test_nearby_is_another_choice_or_a_small_step() -> None:
    generator = random.Random(0)
    assert DEFAULT["teacher.cut_to_box"].near(False, generator) is True
    assert Axis(type="categorical", choices=(4,)).near(4, generator) == 4
    rates = DEFAULT["optim.lr"]
    steps = [rates.place(rates.near(1e-3, generator)) - rates.place(1e-3) for _ in range(200)]
    assert abs(sum(steps) / 200) < 0.03
    assert 0.5 < sum(abs(s) < 0.15 for s in steps) / 200 < 0.85
    decays = [DEFAULT["teacher.decay"].near(0.9, generator) for _ in range(200)]
    assert 0 in decays, "a switch is off when a step leads far enough below the range"
    assert all(DEFAULT["teacher.decay"].holds(d) for d in decays)


def test_a_seed_decides_the_proposals_and_a_study_that_goes_on_makes_others(tmp_path: Path) -> None:
    def points(folder: str) -> list[Any]:
        search, _, _ = begin(make(tmp_path / folder, sampler="random"))
        return [search.suggest(str(i))["point"] for i in range(4)]

    first = points("a")
    assert first == points("b")
    later = points("a")
    assert not [p for p in later[2:] if p in first]


@pytest.mark.parametrize("name", ["asha", "median"])
def test_what_is_behind_is_stopped_but_never_the_papers_nor_before_it_has_warmed_up(name: str, tmp_path: Path) -> None:
    plan = make(tmp_path, scheduler=name)
    scheduler = make_scheduler(plan, Budget(plan), DIRECT)

    class Found(SimpleNamespace):
        __hash__ = object.__hash__  # type: ignore[assignment]

    waiting: Any = SimpleNamespace(get_live_trials=lambda: [SimpleNamespace(status="PENDING")])

    def on_result(trial: Any, score: float, step: int) -> str:
        return scheduler.on_trial_result(waiting, trial, result(score, step))

    goods = []
    for i in range(3):
        good: Any = Found(trial_id=f"good{i}", config={"point": {}})
        scheduler.on_trial_add(None, good)  # type: ignore[arg-type]
        assert on_result(good, 0.9, 4) == TrialScheduler.CONTINUE
        goods.append(good)
    paper: Any = Found(trial_id="paper", config={"reference": "paper"})
    defaults: Any = Found(trial_id="defaults", config={"point": {}, "reference": "defaults"})
    bad: Any = Found(trial_id="bad", config={"point": {}})
    upper: Any = Found(trial_id="upper", config={"role": "supervised"})
    scheduler.on_trial_add(None, upper)  # type: ignore[arg-type]
    assert on_result(upper, 0.99, 4) == TrialScheduler.CONTINUE
    scheduler.on_trial_complete(waiting, upper, result(0.99, 8))
    for t in (paper, defaults, bad):
        scheduler.on_trial_add(None, t)  # type: ignore[arg-type]
    assert on_result(paper, 0.1, 4) == TrialScheduler.CONTINUE
    assert on_result(defaults, 0.1, 4) == TrialScheduler.CONTINUE
    assert on_result(bad, 0.1, 2) == TrialScheduler.CONTINUE
    assert on_result(bad, 0.1, 4) == TrialScheduler.STOP
    assert scheduler.stopped == {"bad": "pruned"}
    for t in (paper, defaults):
        assert on_result(t, 0.1, 6) == TrialScheduler.CONTINUE, "and so on to their ends"
    assert on_result(goods[0], 0.1, 8) == TrialScheduler.CONTINUE


def test_a_study_that_ran_to_its_end_can_be_replayed_with_early_stopping(tmp_path: Path) -> None:
    plan = make(tmp_path, scheduler="none")
    good, bad = [(2, 0.5), (4, 0.6), (8, 0.7)], [(2, 0.5), (4, 0.5), (8, 0.9)]
    runs = [Past(8, "paper", bad), *(Past(8, None, c) for c in (good, good, good, bad))]
    assert replay(plan, runs, DIRECT) == Replayed(steps=8 + 3 * 8 + 4, best=0.9)
    assert replay(plan, runs[1:], DIRECT) == Replayed(steps=3 * 8 + 4, best=0.7), "the late riser was stopped"


@pytest.mark.parametrize("name", ["asha", "median", "none"])
def test_what_is_past_its_best_is_stopped(name: str, tmp_path: Path) -> None:
    plan = make(tmp_path, scheduler=name)  # 8 steps, none judged before 4
    rising = [(2, 0.5), (4, 0.6), (6, 0.7), (8, 0.8)]
    past_best = [(2, 0.9), (4, 0.9005), (6, 0.9005), (8, 0.95)]
    late = [(2, DIRECT), (4, DIRECT), (6, DIRECT), (8, 0.95)]
    whole = name == "none"
    for curve, steps in ((rising, 8), (past_best, 8 if whole else 4), (late, 8)):
        scheduler = make_scheduler(plan, Budget(plan), DIRECT)
        assert tell(scheduler, [Past(8, None, curve)]).steps == steps
        assert list(scheduler.stopped.values()) == ([] if steps == 8 else ["plateau"])
        assert tell(make_scheduler(plan, Budget(plan), DIRECT), [Past(8, "paper", curve)]).steps == 8, "the paper's"
        assert tell(make_scheduler(plan, Budget(plan), DIRECT), [Past(8, "defaults", curve)]).steps == steps


def test_the_first_two_at_a_step_are_behind_nobody(tmp_path: Path) -> None:
    plan = make(tmp_path, scheduler="asha")
    good, bad = [(4, DIRECT), (6, 0.6), (8, 0.7)], [(4, 0.4), (6, 0.8), (8, 0.9)]
    for count, steps in ((1, 8), (2, 16), (3, 20)):
        runs = [Past(8, None, c) for c in (good, bad, bad)[:count]]
        assert tell(make_scheduler(plan, Budget(plan), DIRECT), runs).steps == steps


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_study_that_goes_on_measures_new_trials_by_those_before(name: str, tmp_path: Path) -> None:
    plan = make(tmp_path, scheduler=name)
    scheduler = make_scheduler(plan, Budget(plan), DIRECT)
    tell(scheduler, [Past(8, None, [(2, 0.5), (4, 0.6)])] * 3)
    new: Any = _Trial("new", {})
    scheduler.on_trial_add(_NOTHING_RUNS, new)
    assert scheduler.on_trial_result(_NOTHING_RUNS, new, result(0.5, 2)) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(_NOTHING_RUNS, new, result(0.5, 4)) == TrialScheduler.STOP


def test_none_stops_nothing(tmp_path: Path) -> None:
    plan = make(tmp_path, scheduler="none")
    scheduler = make_scheduler(plan, Budget(plan), DIRECT)
    for i in range(9):
        trial: Any = SimpleNamespace(trial_id=str(i), config={"point": {}})
        assert scheduler.on_trial_result(None, trial, result(1 - 0.1 * i, 4)) == TrialScheduler.CONTINUE


def test_a_place_is_kept_for_each_search_that_has_begun_no_trial() -> None:
    places = Places(2, ["a", "b"])
    a, b = places.of("a"), places.of("b")
    assert places.side_by_side == 2
    assert a.take("a1")
    a.begun()
    assert not a.take("a2")
    assert b.take("b1")
    assert not a.take("a2"), "b1 has not got its place yet"
    b.begun()
    assert a.take("a2"), "from now on whoever comes"
    many = Places(8, ["a", "b"]).of("a")
    assert [many.take(str(n)) for n in range(8)] == [True] * 7 + [False]


def test_a_search_that_has_ended_keeps_no_place() -> None:
    places = Places(2, ["a", "b", "c"])
    a, b, c = (places.of(name) for name in "abc")
    for one in (a, b):
        assert one.take("1")
        one.begun()
    assert not a.take("2")
    a.leave("1")
    assert a.take("2"), "its only one may always wait for a place"
    c.end()
    assert b.take("2")


def test_a_search_that_is_concluded_gets_the_next_place_that_falls_free() -> None:
    places = Places(2, ["a", "b"])
    a, b = places.of("a"), places.of("b")
    a.begun()
    b.begun()
    assert a.take("a1")
    a.ask()
    assert b.take("b1")
    assert not b.take("b2")
    a.end()
    assert b.take("b2")


def test_a_search_waits_while_others_have_begun_no_trial(tmp_path: Path) -> None:
    places = Places(2, ["camouflaged", "medical"])
    search, _, _ = begin(make(tmp_path), place=places.of("camouflaged"))
    first, before = search.suggest("a"), time.time()
    assert (first["number"], first["idle"]) == (1, 0)
    assert search.suggest("b") is None
    places.of("medical").begun()
    second = search.suggest("b")
    assert second["number"] == 2
    assert before <= second["idle"] <= time.time(), "the wait for the other search is none for this study's actors"
    search.on_trial_complete("a", result(0.5, 8))
    search.on_trial_complete("a", result(0.5, 8))
    assert len(places._taken["camouflaged"]) == 1
