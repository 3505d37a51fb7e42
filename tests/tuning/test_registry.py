"""Champions: which adapter becomes one, and how it is got back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow.utils.file_utils import local_file_uri_to_path

import wesam
from tuning import registry
from tuning.cli import main
from tuning.tracking import Tracker
from wesam import AdaptedSam, Config, InputError
from wesam.config import LoraConfig, read_config

Register = Callable[..., tuple[int, str]]

SAME = {"data": "same", "prompt": "box", "val_prompt": "box", "model": "nano", "crop": "0.0", "domain": "d"}


def adapter(tmp_path: Path, seed: int = 0) -> dict[str, bytes]:
    """The files of an adapter that changes something."""
    model = AdaptedSam(wesam.load_sam("nano"), LoraConfig(rank=1, targets="qkv"))
    with torch.no_grad():
        for p in model.trainable():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    model.save(tmp_path)
    return {f.name: f.read_bytes() for f in sorted(tmp_path.iterdir())}


@pytest.fixture
def register(tracker: Tracker, tmp_path_factory: pytest.TempPathFactory) -> Register:
    """Registers an adapter with this mean and spread on test, in a run of its own unless one is given."""
    files = adapter(tmp_path_factory.mktemp("adapter"))

    def enter(
        mean: float, spread: float | None = None, run_id: str | None = None, domain: str = "d", **other: str
    ) -> tuple[int, str]:
        if run_id is None:
            parent = tracker.start(domain, "domain", None, {})
            parent.log({"ellipse_test_miou": 0.31})
            run = tracker.start("t", "trial", parent, {"wesam.trial": "1"})
            run.log(params=Config().flat())
            run.attach(lambda: files, "adapter")
            run_id = run.id
        tags = {**SAME, "val_miou": "0.9", "test_miou": str(mean), "direct_test_miou": "0.2", "study": "s", **other}
        tags |= {} if spread is None else {"test_miou_sd": str(spread), "test_seeds": "3"}
        return registry.promote(tracker, domain, run_id, tags)

    return enter


def test_a_champion_is_replaced_only_by_one_that_is_better_by_more_than_the_spread(
    tracker: Tracker, register: Register
) -> None:
    assert register(0.5, 0.01) == (1, "registered as champion")
    version, told = register(0.505, 0.002)
    assert version == 2
    assert "stays version 1 (mIoU on test 0.500 ± 0.010, this one 0.505 ± 0.002: not better" in told
    assert "stays version 1" in register(0.52, 0.03)[1], "its own spread counts too"
    assert "stays version 1" in register(0.4)[1]
    best = registry.champion(tracker, "d")
    assert best is not None
    assert (best.version, best.test) == (1, ("miou", 0.5, 0.01))
    assert register(0.511) == (5, "registered as champion in place of version 1 (0.500 ± 0.010 on test)")
    assert register(0.512)[1].startswith("registered as champion"), "no spread is known of either"
    assert "stays version 6" in register(0.512)[1], "as good is not better"
    assert [e.version for e in registry.champions(tracker)] == [6]


@pytest.mark.parametrize(
    ("differs", "to"),
    [
        ("data", "new"),
        ("prompt", "point"),
        ("val_prompt", "point"),
        ("model", "vit_b"),
        ("weights", "def"),
        ("crop", "2.0"),
        ("test_instances", "16"),
        ("labels", "coarse 2"),
    ],
)
def test_a_champion_that_cannot_be_compared_is_replaced(register: Register, differs: str, to: str) -> None:
    register(0.5, **{"weights": "abc"} if differs == "weights" else {})
    assert f"in place of version 1 (its {differs} differed)" in register(0.1, **{differs: to})[1]


def test_the_same_weights_are_compared_wherever_they_lie(register: Register) -> None:
    register(0.5, model="/a/mine.pth", weights="abc")
    assert "stays version 1" in register(0.4, model="/b/mine.pth", weights="abc")[1]


def test_an_older_champion_was_scored_with_all_instances(register: Register) -> None:
    register(0.5)
    assert "stays version 1" in register(0.4, test_instances="0")[1]


def test_scores_of_other_kinds_are_not_compared(register: Register) -> None:
    register(0.5)
    assert "stays version 1" in register(0.4, score="f1", val_f1="0.9")[1], "on test both have mIoU"
    assert "its score differed" in register(0.1, score="label_free", test_label_free="0.1")[1]


def test_a_run_is_registered_once(tracker: Tracker, register: Register) -> None:
    register(0.5)
    first = registry.champion(tracker, "d")
    assert first is not None
    assert register(0.9, run_id=first.run_id) == (1, "still champion, as version 1")
    register(0.6)
    assert register(0.9, run_id=first.run_id) == (1, "registered before, as version 1; champion is version 2")


def test_a_promotion_that_was_interrupted_is_made_good(
    tracker: Tracker, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(0.5)

    def interrupted(*given: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(tracker.client, "set_registered_model_alias", interrupted)
        with pytest.raises(KeyboardInterrupt):
            register(0.8)
    run_id = tracker.client.get_model_version("wesam-d", "2").run_id
    assert register(0.8, run_id=run_id) == (2, "registered as champion in place of version 1 (0.500 on test)")


def test_a_fetched_adapter_comes_with_its_configuration_and_card(
    tracker: Tracker, register: Register, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no champion"):
        registry.fetch(tracker, "birds", None)
    register(0.7, 0.02, domain="birds", supervised_test_miou="0.9", gap_closed="0.714")
    out = tmp_path / "out"
    entry, config = registry.fetch(tracker, "birds", out)
    assert entry.domain == "birds"
    assert config == Config().flat()
    assert read_config(out / registry.SETTINGS) == Config()
    told = (out / registry.CARD).read_text()
    for row in (
        "| ellipse in the box | 0.310 |",
        "| **this adapter** | 0.700 ± 0.020 |",
        "71 % of the gap",
        entry.run_id,
    ):
        assert row in told
    assert AdaptedSam.load(wesam.load_sam("nano"), out).trainable()
    with pytest.raises(InputError, match="did you mean 'birds'"):
        registry.fetch(tracker, "bird", None)
    version = tracker.client.get_model_version("wesam-birds", "1")
    assert "0.700 ± 0.020; without an adapter 0.200" in version.description


def test_a_folder_that_holds_something_else_is_left_alone(
    tracker: Tracker, register: Register, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(0.7)
    out = tmp_path / "out"
    fetch = ["best", "d", "--out", str(out), "--tracking-uri", tracker.uri]
    assert main(fetch) == 0
    assert "in place of" not in capsys.readouterr().out
    assert main(fetch) == 0
    assert "in place of the one that was there" in capsys.readouterr().out
    (out / "notes.txt").write_text("mine")
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    assert main(fetch) == 2
    assert "holds something else (notes.txt)" in capsys.readouterr().err
    assert {f.name: f.stat().st_mtime_ns for f in out.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / registry.CARD).write_text("of some other thing")
    with pytest.raises(InputError, match=r"holds something else \(README"):
        registry.fetch(tracker, "d", tmp_path / "other")


def test_a_champion_of_an_older_version_is_fetched_without_a_card(
    tracker: Tracker, register: Register, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    fetch = ["best", "d", "--out", str(out), "--tracking-uri", tracker.uri]
    register(0.7)
    assert main(fetch) == 0
    best = registry.champion(tracker, "d")
    assert best is not None
    artifacts = local_file_uri_to_path(tracker.client.get_run(best.run_id).info.artifact_uri)
    shutil.rmtree(Path(artifacts) / registry.MODEL)
    capsys.readouterr()
    assert main(fetch) == 0
    told = capsys.readouterr().out
    assert told.count("without a card") == 1
    assert "its card" not in told
    assert {f.name for f in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", registry.SETTINGS}


def test_all_champions_are_listed_with_their_spread(
    tracker: Tracker, register: Register, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register(0.7, 0.02, domain="birds", supervised_test_miou="0.9", gap_closed="0.714")
    register(0.5, domain="ants")
    assert main(["best", "--tracking-uri", tracker.uri, "--json", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["domain", "ants", "birds"]
    assert "0.700 ± 0.020" in lines[2]
    ants, birds = json.loads((tmp_path / "r.json").read_text())
    assert (ants["test"], ants["test_sd"], ants["supervised_test"]) == (0.5, None, None)
    assert (birds["test"], birds["test_sd"], birds["gap_closed"]) == (0.7, 0.02, 0.714)


def test_the_best_adapter_is_one_call_away_and_kept(
    tracker: Tracker, register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WESAM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    register(0.7)
    folder = registry.best_folder("d")
    assert folder.is_relative_to(tmp_path / "home")
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    boxes = wesam.Prompts(boxes=torch.tensor([[10.0, 10.0, 50.0, 40.0]]))
    own = AdaptedSam.load(wesam.load_sam("nano"), folder)
    for model in (registry.best_adapter("d"), registry.best_adapter("d", tracker.uri, "nano")):
        assert wesam.predict(model, image, boxes)[1] == wesam.predict(own, image, boxes)[1]
    read = os.stat(folder / "adapter_config.json").st_mtime_ns
    assert registry.best_folder("d") == folder
    assert os.stat(folder / "adapter_config.json").st_mtime_ns == read, "it is not fetched again"
    register(0.8)
    assert registry.best_folder("d") != folder
    assert not list(folder.parent.glob(".*")), "nothing half done is left"


def test_asking_for_champions_creates_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="there is no MLflow database"):
        registry.best_adapter("d")
    assert list(tmp_path.iterdir()) == []
