"""What a study is told: the space, the study's file, the command line's assignments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tuning.plan import DEMO, JOB_FOLDERS, Plan, in_file, make_plan, read_study
from tuning.sampler import open_storage
from tuning.space import DEFAULT, Axis
from tuning.tracking import Tracker
from wesam.config import Config, preset
from wesam.errors import InputError
from wesam.methods import METHODS


def plan(assignments: list[str] | None = None, **settings: Any) -> Plan:
    return make_plan({"domains": ["camouflaged"], **settings}, assignments or [])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_axis_is_a_hyperparameter_and_holds_the_papers_value() -> None:
    flat = Config().flat()
    for path, axis in DEFAULT.items():
        assert axis.holds(flat[path]), path


def test_between_whole_numbers_nothing_lies_on_an_axis_of_them() -> None:
    made = plan(space={"loss.dice": {"type": "int", "low": 0, "high": 10}})
    assert made.base.loss.dice == 0.3
    assert made.point("defaults") is None
    assert made.space["loss.dice"].holds(1.0)
    assert made.space["loss.dice"].nearest(1.7, 0.3) == 2


def test_what_a_method_reads_is_searched_with_its_own_defaults() -> None:
    assert all(p in DEFAULT or p.startswith("views") for m in METHODS.values() for p in m.searched)
    assert plan().base.method == "wesam+"
    assert plan().space.keys() == plan(prompt="point").space.keys()
    boxes, clicks = plan(["method=wesam"]).space, plan(["method=wesam"], prompt="point").space
    assert boxes.keys() - clicks.keys() == {"loss.tightness", "teacher.cut_to_box"}
    assert "loss.dice" not in boxes
    for given in (plan(["method=tent"]), plan(set={"method": "tent"})):
        assert given.space.keys() == {"optim.lr", "optim.weight_decay"}
        assert given.base.train == "norms"
    both = plan(space={"method": {"choices": ["wesam", "wesam+"]}}).space
    assert both.keys() == boxes.keys() | {"loss.label", "method"}
    with pytest.raises(InputError, match="wesam"):
        plan(["method=wesan"])


def test_a_plan_is_the_same_after_its_json() -> None:
    first = plan(space={"lora.rank": {"choices": [2, 4]}, "views.strength": 0.5}, seed=3)
    assert Plan.from_json(first.to_json()) == first


def test_the_password_of_a_database_stays_out_of_the_json_and_makes_no_difference() -> None:
    first = plan(optuna="postgresql://me:secret@host/db")
    assert "secret" not in first.to_json()
    assert first.differs(Plan.from_json(first.to_json())) is None
    assert plan(optuna="postgresql://me:secret@elsewhere/db").differs(first) == (
        "optuna postgresql://me:***@host/db, not postgresql://me:***@elsewhere/db"
    )
    assert plan().differs(first) == "another optuna"


def test_what_two_plans_differ_in_is_named() -> None:
    assert plan(steps=8).differs(plan(steps=9)) == "steps 9, not 8"
    assert plan(["optim.batch_size=3"]).differs(plan()) == "optim.batch_size 4, not 3"
    assert plan(space={"lora.rank": {"choices": [2, 4]}}).differs(plan()) == "another space of lora.rank"
    found, later = ((f"other/{name}", Config().flat()) for name in ("medical", "camouflaged"))
    assert replace(plan(), warm=(found,)).differs(replace(plan(), warm=(later, found))) is None, "it has gone on since"
    assert replace(plan(), warm=(found,)).differs(plan()) == "another from"
    assert plan(trials=3).differs(plan(trials=9)) is None


def test_a_study_of_many_domains_has_a_name_that_can_be_one(tmp_path: Path) -> None:
    domains = [f"camouflaged+gaussian_noise:{n}" for n in range(1, 6)]
    assert plan(domains=domains[:2]).name == "camouflaged+gaussian_noise1-camouflaged+gaussian_noise2-box"
    name = plan(domains=domains).name
    assert name.endswith("camouflaged+gaussian_noise3-and-2-more-box")
    assert len(name) <= 100
    with pytest.raises(InputError, match="101 letters, of at most 100"):
        plan(name="x" * 101)


def test_the_options_of_a_storages_address_stay_at_its_end() -> None:
    given = plan(storage="s3://bucket/studies/?region=eu&scheme=http", name="s")
    assert given.place("trials") == "s3://bucket/studies/s/trials?region=eu&scheme=http"
    assert given.place() == "s3://bucket/studies/s?region=eu&scheme=http"
    assert plan(storage="a?b", name="s").place("trials") == str(Path("a?b/s/trials").absolute())


@pytest.mark.parametrize("folder", ["a%20b", "a?b", "50%off", "ä b#c"])
def test_optunas_file_lies_where_the_study_does(tmp_path: Path, folder: str) -> None:
    open_storage(plan(storage=str(tmp_path / folder), name="s").optuna_url())
    assert (tmp_path / folder / "s" / "optuna.db").is_file()


@pytest.mark.parametrize("place", ["s3://key:secret@bucket/x", "http://me:secret@host/x+fog:5", "ftp://me:secret@host"])
def test_addresses_that_a_run_will_tell_have_no_password(place: str) -> None:
    for settings in ({"storage": place}, {"domains": [place]}):
        with pytest.raises(InputError, match=r":\*\*\*@.*by the environment") as e:
            plan(**settings)
        assert "secret" not in str(e.value)


def test_the_kind_of_an_axis_can_be_changed() -> None:
    space = plan(space={"lora.rank": {"choices": [2, 4]}}).space
    assert space["lora.rank"] == Axis(type="categorical", choices=(2, 4))
    space = plan(space={"teacher.decay": {"choices": [0.0, 0.9]}}).space
    assert (space["teacher.decay"].type, space["teacher.decay"].choices) == ("categorical", (0.0, 0.9))
    assert plan(space={"lora.rank": {"high": 8}}).space["lora.rank"] == Axis(type="int", low=2, high=8, log=True)
    with pytest.raises(InputError, match="a categorical has no low"):
        plan(space={"lora.targets": {"low": 0.9}})


def test_what_has_an_option_is_given_by_it() -> None:
    assert plan(crop=2).base.crop == 2
    with pytest.raises(InputError, match="--crop, or crop: in a study's file"):
        plan(["crop=2"])
    with pytest.raises(InputError, match="nothing is left to search"):
        plan(set={path: value for path, value in Config().flat().items() if path in DEFAULT})


def test_a_model_may_be_a_file_which_workers_find_from_elsewhere(tmp_path: Path) -> None:
    Path("mine.pth").touch()
    assert plan(model="mine.pth").model == str(tmp_path / "mine.pth")
    assert plan(model="nano").model == "nano"


def test_the_demo_can_be_made() -> None:
    made = make_plan(DEMO, [])
    assert made.trials == 8
    assert len(made.domains) == 3


def test_box_aids_are_searched_only_with_boxes() -> None:
    assert "loss.tightness" in plan(["method=wesam"]).space
    assert "loss.tightness" not in plan(["method=wesam"], prompt="point").space
    with pytest.raises(InputError, match="use --prompt box"):
        plan(["loss.tightness=1"], prompt="point")


def test_what_the_method_does_not_read_is_neither_set_nor_searched() -> None:
    axis = {"type": "float", "low": 0.0, "high": 1.0}
    for given in ({"set": {"loss.tightness": 1.0}}, {"space": {"loss.tightness": axis}}):
        with pytest.raises(InputError, match=r"loss.tightness has no effect on wesam\+: it is for wesam") as refused:
            plan([], **given)
        assert refused.value.at == (*given, "loss.tightness")
    both = {"method": {"choices": ["wesam", "wesam+"]}, "loss.tightness": axis, "loss.label": {}}
    assert both.keys() <= plan([], space=both).space.keys()


def test_what_is_given_a_value_is_not_searched() -> None:
    made = plan(["lora.rank=8"], set={"views.strength": 0.5}, space={"optim.lr": 1e-3})
    assert not {"lora.rank", "views.strength", "optim.lr"} & set(made.space)
    flat = made.config(None, {}).flat()
    assert (flat["lora.rank"], flat["views.strength"], flat["optim.lr"]) == (8, 0.5, 1e-3)


def test_steps_of_the_references_are_computed_as_the_studys_own() -> None:
    made = plan(["compute.precision=bf16", "compute.checkpointing=true"])
    assert made.config("paper", {}).compute == made.supervised().compute == made.base.compute
    assert made.base.compute.checkpointing


def test_the_papers_trial_takes_only_the_budget_from_the_study() -> None:
    made = plan(["lora.rank=8", "optim.batch_size=2"], steps=7, seed=5)
    paper = made.config("paper", {})
    budget = {"steps": 7, "eval_every": 1, "seed": 5, "optim.batch_size": 2, "max_instances": 8}
    clicks = {"grid.predicted_iou": 0.6, "grid.stability": 0.5}  # what is trained on, not how
    assert paper == preset("paper").replace({**budget, **clicks})
    assert made.config("defaults", {}) == made.base


def test_a_reference_outside_of_the_space_has_no_point_in_it() -> None:
    assert plan(["method=wesam"]).point("paper") is not None
    assert plan(["method=wesam"], space={"lora.rank": {"type": "int", "low": 8, "high": 16}}).point("paper") is None
    assert plan().point("paper") is None, "its method is another one"
    assert plan(space={"method": {"choices": ["wesam", "wesam+"]}}).point("paper") is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": ["camoflaged"]}, "did you mean 'camouflaged'"),
        ({"domains": ["no/such"]}, "no such folder"),
        ({"domains": []}, "no domain given"),
        ({"domains": ["clean", "clean"]}, "given twice"),
        ({"model": "nan"}, "did you mean 'nano'"),
        ({"prompt": "boxes"}, "did you mean 'box'"),
        ({"name": "a/b"}, "--name"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"workers": 9}, "raise optim.batch_size"),
        ({"steps": 0}, "steps must lie in"),
        ({"set": {"lora.rnk": 1}}, "did you mean 'lora.rank'"),
        ({"set": {1: 1}}, "unknown hyperparameter '1'"),
        ({"set": {"method": "wsam"}}, "did you mean 'wesam'"),
        ({"space": {"lora.rnk": 1}}, "did you mean 'lora.rank'"),
        ({"space": {"steps": 10}}, "same for all trials"),
        ({"space": {"lora.rank": {"lo": 1}}}, "did you mean 'low'"),
        ({"space": {"lora.rank": {"low": 0}}}, r"lora.rank: rank must lie in \[1, 256\]"),
        ({"space": {"lora.rank": {"low": 80}}}, "low 80 is above high 64"),
        ({"space": {"lora.rank": {"low": 1.5}}}, "whole number"),
        ({"space": {"optim.lr": {"low": 0}}}, "with log, low must be above 0"),
        ({"space": {"optim.lr": {"type": "real"}}}, "type must be"),
        ({"space": {"lora.targets": {"choices": ["qvk"]}}}, "did you mean 'qk?v'"),
        ({"space": {"lora.targets": {"choices": []}}}, "needs choices"),
        ({"space": {"views.strength": None}}, "strength must be a number"),
        ({"space": {"loss.label": {"high": float("inf")}}}, "label: high must be finite, got inf"),
        ({"space": {"loss.label": {"high": float("nan")}}}, "label: high must be finite, got nan"),
        ({"space": {"lora.rank": {"high": 10**400}}}, "rank: high must be finite, got 1000"),
        ({"space": {"method": {"choices": None}}}, "method: a categorical needs choices"),
        ({"space": {"method": {"choices": 5}}}, "method: a categorical needs choices"),
        ({"space": {"teacher.decay": {"high": 1.0}}}, "high is below 1"),
        ({"space": {"teacher.decay": {"zero": 1}}}, "zero must be true or false"),
        ({"space": {"optim.lr": {"log": 1}}}, "log must be true, false or complement"),
        ({"workers": 2, "space": {"optim.batch_size": {"choices": [1, 4]}}}, "2 workers share 1 images a step"),
        ({"workers": 3, "space": {"optim.batch_size": {"type": "int", "low": 2, "high": 4}}}, "3 workers share 2"),
        ({"workers": 8, "space": {"optim.batch_size": {"choices": [8, 16]}}}, "8 workers share 4 .*in set"),
        ({"steps": 10**400}, "steps must be finite, got 1000"),
        ({"set": {"optim.lr": 10**400}}, "lr must be finite, got 1000"),
        ({"space": {"optim.lr": {"choices": [10**400]}}}, "lr must be finite, got 1000"),
        ({"gpus_per_worker": float("inf")}, "gpus_per_worker must be a share"),
        ({"workers": 2, "gpus_per_worker": 0.5}, "need a GPU each"),
        ({"sampler": "tpf"}, "did you mean 'tpe'"),
        ({"scheduler": "hyperband"}, "unknown scheduler"),
        ({"objective": "iou"}, "did you mean 'miou'"),
        ({"minimize": ["time"]}, "unknown minimize"),
        ({"hours": 0.0}, "hours must be above 0"),
        ({"gpus_per_worker": 2}, "a share of one GPU, got 2: workers puts"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        plan(**settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trials: [", r"study.yaml:1"),
        ("- a\n- b", "expected keys"),
        ("name: x\ntrails: 3", r"study.yaml:2: .* did you mean 'trials'"),
        ("trials: three", r"study.yaml:1: trials must be a whole number"),
        ("name: x\nhours: 1" + 400 * "0", r"study.yaml:2: hours must be finite, got 1000"),
        ("hours: .nan", r"study.yaml:1: hours must be finite, got nan"),
        ("domains: clean", "domains must be a list"),
        ("domains: [clean]\nspace:\n  lora.rank:\n    low: 4\n    hihg: 3", r"study.yaml:5: .* did you mean 'high'"),
        ("domains: [clean]\nspace:\n  lora.rank: {low: 4, high: 3}", r"study.yaml:3: space: lora.rank: low 4 is above"),
        ("domains: [clean]\nset:\n  lora.rnk: 4", r"study.yaml:3: .* did you mean 'lora.rank'"),
        ("name: x\n\ndomains: [clean, clean]", r"study.yaml:3: the domain 'clean' is given twice"),
        ("domains: [clean]\nsampler: tpf", r"study.yaml:2: .* did you mean 'tpe'"),
        ("\x00", "study.yaml"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)

    def read() -> None:
        found, lines = read_study(path)
        with in_file(path, lines):
            make_plan(found, [])

    with pytest.raises(InputError, match=message):
        read()


def test_a_study_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "name: mine\ndomains: [clean, medical]\ntrials: 4\nset: {loss.iou: 0.5}\n"
        "space:\n  optim.lr: {low: 1e-3, high: 1e-2}\n  optim.weight_decay: {type: float, low: 0.0, high: 0.1}\n"
    )
    made = make_plan(read_study(path)[0], [])
    assert made.domains == ("clean", "medical")
    assert (made.space["optim.lr"].low, made.space["optim.lr"].log) == (1e-3, True)
    assert "optim.weight_decay" in made.space
    assert "loss.iou" not in made.space


def test_nothing_is_kept_in_the_folder_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray deletes it with the session, and another package has another one."""
    job = tmp_path / JOB_FOLDERS / "_ray_pkg_0"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(InputError, match=r"^--storage runs is in the folder of this Ray job"):
        plan(domains=["clean"])
    with pytest.raises(InputError, match=r"^--tracking-uri .*mlflow\.db is in the folder of this Ray job"):
        Tracker("sqlite:///mlflow.db")
    assert plan(domains=["clean"], storage=str(tmp_path / "kept")).storage == str(tmp_path / "kept")
