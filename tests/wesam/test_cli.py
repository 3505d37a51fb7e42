from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wesam import AdaptedSam, baseline, console, load_domain, load_sam, training
from wesam.adapters import WEIGHTS_FILE
from wesam.cli import COMMANDS, main
from wesam.config import LoraConfig
from wesam.console import guarded, program
from wesam.data import SPLITS
from wesam.options import make_parser
from wesam.sam import write_weights
from wesam.sam.nano import Shape, build_nano
from wesam.training import _place


def test_listings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["models", "--json", str(tmp_path / "m.json")]) == 0
    assert main(["domains"]) == 0
    out = capsys.readouterr().out
    assert "nano" in out
    assert "camouflaged" in out
    assert json.loads((tmp_path / "m.json").read_text())[0]["input"] == 192


def test_adapt_evaluate_and_predict_in_a_row(coco_folder: Path, tmp_path: Path) -> None:
    adapter, result = tmp_path / "adapter", tmp_path / "r.json"
    few = ["--steps", "2", "--set", "eval_every=1", "optim.batch_size=2"]
    assert main(["adapt", "--domain", str(coco_folder), "--out", str(adapter), "--json", str(result), *few]) == 0
    row = json.loads(result.read_text())
    assert row["domain"] == "shapes"
    assert row["best"] >= row["direct"]
    record = json.loads((adapter / "adaptation.json").read_text())
    assert record["config"]["steps"] == 2
    assert [c["step"] for c in record["curve"]] == [0, 1, 2]

    common = ["evaluate", "--domain", str(coco_folder), "--prompt", "box", "--json", str(result)]
    assert main([*common, "--split", "val", "--adapter", str(adapter)]) == 0
    row = json.loads(result.read_text())
    assert list(row) == [
        "domain",
        "model",
        "adapter",
        "prompt",
        "split",
        "images",
        "instances",
        "miou",
        "f1",
    ]
    assert row["miou"] == pytest.approx(json.loads((adapter / "adaptation.json").read_text())["best"])
    assert (row["images"], row["instances"]) == (2, 4)
    assert main([*common, "--split", "val", "--instances", "1"]) == 0
    assert json.loads(result.read_text())["instances"] == 2
    assert main([*common, "--instances", "-1"]) == 2

    image, mask, picture = coco_folder / "images" / "test-0.png", tmp_path / "mask.png", tmp_path / "o.png"
    for given in (
        ["--box", "15,15,45,45"],
        ["--tight-box", "15,15,45,45"],
        ["--point", "30,30", "70,50,0"],
        ["--polygon", "15,15", "45,20", "30,45"],
    ):
        predict = ["predict", str(image), "--adapter", str(adapter), "--out", str(mask)]
        assert main([*predict, *given, "--overlay", str(picture)]) == 0
        pixels = np.asarray(Image.open(mask))
        assert pixels.shape == (60, 90)
        assert set(np.unique(pixels)) <= {0, 255}
        assert Image.open(picture).size == (90, 60)
        if given[0] == "--tight-box":
            assert pixels[15:45, 15:45].sum() == pixels.sum() > 0


def test_an_adaptation_can_be_repeated_from_its_record(coco_folder: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a", tmp_path / "b"
    few = ["--steps", "2", "--set", "eval_every=1", "--set", "lora.rank=2", "--seed", "3", "--prompt", "point"]
    common = ["adapt", "--domain", str(coco_folder)]
    assert main([*common, "--out", str(first), *few]) == 0
    assert main([*common, "--out", str(again), "--config", str(first / "adaptation.json"), "--steps", "1"]) == 0
    one, two = (json.loads((d / "adaptation.json").read_text()) for d in (first, again))
    assert two["config"] == {**one["config"], "steps": 1}
    assert two["curve"] == one["curve"][:2]


def test_an_adapter_is_overwritten_only_when_told_to(
    coco_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    command = ["adapt", "--domain", str(coco_folder), "--out", str(out), "--steps", "1", "--set", "eval_every=1"]
    assert main(command) == 0
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"error: {out} holds an adapter (adapter_config.json): give another --out, or --overwrite" in error
    assert error.count("\n") == 1
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wesam.training.keep_best", stopped)
        assert main([*command, "--overwrite"]) == 130
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert main([*command, "--overwrite"]) == 0
    assert (out / "adaptation.json").is_file()

    (out / "README.md").write_text("its card")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    assert main([*command, "--overwrite"]) == 2
    assert f"error: {out} holds README.md, which would tell of another adapter" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_what_ends_early_replaces_an_adapter_only_by_one_that_has_learned_something(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).write_text("old")
    (tmp_path / "adaptation.json").write_text("of the old one")

    def ended(*, learned: bool) -> None:
        with _place(tmp_path, old=True, learned=lambda: learned) as folder:
            (folder / WEIGHTS_FILE).write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ended(learned=False)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        WEIGHTS_FILE: "old", "adaptation.json": "of the old one"
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        ended(learned=True)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {WEIGHTS_FILE: "new"}


@pytest.mark.parametrize("wrong", [["--objective", "miou"], ["--method", "supervised"]])
def test_an_adaptation_that_cannot_work_is_refused_before_the_first_step(
    coco_folder: Path, tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    domain, out = tmp_path / "boxes", tmp_path / "adapter"
    shutil.copytree(coco_folder, domain)
    for split in SPLITS:
        listing = json.loads((domain / f"{split}.json").read_text())
        for annotation in listing["annotations"]:
            del annotation["segmentation"]
            annotation["bbox"] = [55, 10, 25, 30]
        (domain / f"{split}.json").write_text(json.dumps(listing))
    assert main(["adapt", "--domain", str(domain), "--out", str(out), "--steps", "1", *wrong]) == 2
    assert "has no masks on" in capsys.readouterr().err
    assert not out.exists()


def test_the_model_is_the_one_that_the_adapter_is_for(coco_folder: Path, tmp_path: Path) -> None:
    sam = build_nano(Shape(side=64, width=24, depth=2, heads=2, whole=(1,), channels=16)).eval()
    sam.name_or_path = "nano"
    write_weights(sam, weights := tmp_path / "own.safetensors")
    AdaptedSam(load_sam(str(weights)), LoraConfig()).save(tmp_path / "adapter")
    common = ["evaluate", "--domain", str(coco_folder), "--adapter", str(tmp_path / "adapter")]
    assert main(common) == 2, "for other weights of a nano"
    assert main([*common, "--model", str(weights)]) == 0


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_an_adapter_is_merged_into_plain_weights(coco_folder: Path, tmp_path: Path, ending: str) -> None:
    adapter, weights, result = tmp_path / "adapter", tmp_path / f"merged.{ending}", tmp_path / "r.json"
    common = ["--domain", str(coco_folder), "--json", str(result)]
    few = ["--steps", "2", "--set", "eval_every=2", "--set", "optim.lr=0.01", "--set", "optim.warmup_steps=0"]
    assert main(["adapt", *common, "--method", "supervised", "--out", str(adapter), *few]) == 0
    assert main(["export", "--adapter", str(adapter), "--merge", str(weights)]) == 0
    scores = []
    for model in (["--adapter", str(adapter)], ["--model", str(weights)], []):
        assert main(["evaluate", *common, *model]) == 0
        scores.append(json.loads(result.read_text())["miou"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert abs(scores[0] - scores[2]) > 0.002, "the adapter changes something"


@pytest.mark.parametrize("name", ["own.safetensors", "link.safetensors", "adapter/adapter_model.safetensors"])
def test_what_is_merged_is_not_overwritten(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(load_sam("nano"), weights := tmp_path / "own.safetensors")
    (tmp_path / "link.safetensors").symlink_to(weights)
    AdaptedSam(load_sam(str(weights)), LoraConfig(rank=2)).save(tmp_path / "adapter")
    before = (tmp_path / name).read_bytes()
    command = ["export", "--model", str(weights), "--adapter", str(tmp_path / "adapter"), "--merge"]
    assert main([*command, str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / name} is read, and would be overwritten: give another file\n"
    assert (tmp_path / name).read_bytes() == before
    assert main([*command, str(tmp_path / "merged.pth")]) == 0


def test_an_adapter_is_written_for_transformers(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AdaptedSam(load_sam("nano"), LoraConfig(rank=2), crop=2).save(tmp_path / "adapter")
    assert main(["export", "--adapter", str(tmp_path / "adapter"), "--peft", str(tmp_path / "peft")]) == 0
    told = capsys.readouterr().out
    assert f"SamModel.from_pretrained('{tmp_path}/peft/base')" in told
    assert "--crop 2" in told
    assert (tmp_path / "peft" / "base" / "model.safetensors").is_file()


@pytest.mark.parametrize("prompt", ["box", "point", "coarse"])
def test_a_sheet_shows_a_domain_with_its_weak_labels(coco_folder: Path, tmp_path: Path, prompt: str) -> None:
    out = tmp_path / "sheet.png"
    assert main(["show", str(coco_folder), "--prompt", prompt, "--images", "9", "--out", str(out)]) == 0
    with Image.open(out) as page:
        assert page.width > 3 * 300, "three images, side by side"
        white = (np.asarray(page)[40:] == 255).all(2).mean()
    assert white < 0.6


def test_a_model_is_scored_with_several_kinds_of_prompts(coco_folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "r.json"
    common = ["evaluate", "--domain", str(coco_folder), "--json", str(result)]
    assert main([*common, "--prompt", "box,point,coarse"]) == 0
    rows = json.loads(result.read_text())
    assert [r["prompt"] for r in rows] == ["box", "point", "coarse"]
    for row in rows:
        assert main([*common, "--prompt", row["prompt"]]) == 0
        assert json.loads(result.read_text()) == row


def test_weak_labels_are_crossed(coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "r.json"
    common = ["--domain", str(coco_folder), "--json", str(result)]
    few = ["--steps", "2", "--set", "eval_every=1", "--set", "optim.batch_size=2"]
    assert main(["cross", *common, *few, "--prompts", "box,point,grid", "--seeds", "2", "--set", "optim.lr=0.01"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-5].split() == ["trained_with", "score", "box", "box_sd", "point", "point_sd"]
    assert [line.split()[0] for line in printed[-4:]] == ["Direct", "box", "point", "grid"]
    rows = json.loads(result.read_text())
    assert [r["trained_with"] for r in rows] == [None, "box", "point", "grid"]
    for row in rows[1:]:
        for kind in ("box", "point"):
            assert len(row[f"{kind}_all"]) == 2
            assert row[kind] == pytest.approx(sum(row[f"{kind}_all"]) / 2)
    assert main(["evaluate", *common, "--prompt", "box,point"]) == 0
    direct = json.loads(result.read_text())
    assert [r["miou"] for r in direct] == [rows[0]["box"], rows[0]["point"]]


def test_check_lists_all_faults_of_listings_and_of_images(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (coco_folder / "images" / "train-0.png").read_bytes()
    (coco_folder / "images" / "train-0.png").write_bytes(whole[: len(whole) // 2])
    (coco_folder / "images" / "val-1.png").unlink()
    assert main(["check", str(coco_folder), "--json", str(tmp_path / "r.json")]) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["errors"]) == 2
    assert "1 of 2 images of" in report["errors"][0]
    assert f"missing, such as images/val-1.png; looked in {coco_folder}" in report["errors"][0]
    assert "train-0.png" in report["errors"][1]
    assert [s["images"] for s in report["splits"]] == [3, 1, 2]
    assert main(["evaluate", "--domain", str(coco_folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_check_says_how_large_instances_are(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(coco_folder), "--json", str(tmp_path / "r.json")]) == 0
    sides = [s["median_side"] for s in json.loads((tmp_path / "r.json").read_text())["splits"]]
    assert sides == pytest.approx([29 / 100, 29 / 90, 29 / 90], abs=0.05)  # a disc of 29 pixels and a square of 30
    assert "--crop" not in capsys.readouterr().out
    small = Path(shutil.copytree(coco_folder, tmp_path / "small"))
    for split in ("train", "val", "test"):
        listed = json.loads((small / f"{split}.json").read_text())
        for one in listed["annotations"]:
            one["segmentation"] = [[20, 20, 24, 20, 24, 24, 20, 24]]
        (small / f"{split}.json").write_text(json.dumps(listed))
    assert main(["check", str(small)]) == 0
    assert "--crop 2" in capsys.readouterr().out


def test_check_lists_images_that_splits_share(
    coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(coco_folder), "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["shared"] == []
    assert "shared:" not in capsys.readouterr().out
    for n in range(2):
        shutil.copy(coco_folder / f"images/train-{n}.png", coco_folder / f"images/test-{n}.png")
    assert main(["check", str(coco_folder), "--json", str(tmp_path / "r.json")]) == 0
    line = "train and test share 2 images, shapes/train/images/train-0.png is shapes/test/images/test-0.png"
    assert json.loads((tmp_path / "r.json").read_text())["shared"] == [line]
    told = capsys.readouterr().out
    assert f"shared: {line}\n" in told
    assert "0 annotations or images left out, but 1 pairs of its splits share images" in told


def test_baselines_need_no_model(coco_folder: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--domain", str(coco_folder), "--json", str(tmp_path / "r.json")]
    assert main([*command, "--baseline", "box"]) == 0
    assert 0.85 < json.loads((tmp_path / "r.json").read_text())["miou"] < 0.95  # a disc and a square


def test_baselines_are_drawn_from_the_given_labels(small: Path, tmp_path: Path) -> None:
    command = ["evaluate", "--domain", str(small), "--json", str(tmp_path / "r.json")]
    assert main([*command, "--baseline", "ellipse", "--prompt", "box,coarse-box"]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    test = load_domain(str(small)).split("test")
    expected = {k: baseline("ellipse", test, k).miou for k in ("box", "coarse-box")}  # type: ignore[arg-type]
    assert {r["prompt"]: r["miou"] for r in rows} == expected
    assert expected["box"] != expected["coarse-box"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate --domain camouflage", "did you mean 'camouflaged'"),
        ("evaluate --domain no/where", "no such folder: no/where"),
        ("evaluate --domain clean --model nan", "did you mean 'nano'"),
        ("evaluate --domain clean --adapter no/where", "no adapter in no/where"),
        ("evaluate --domain clean --prompt boxes", "did you mean 'box'"),
        ("evaluate --domain clean --prompt box,pint", "did you mean 'point'"),
        ("evaluate --domain clean --prompt box,point --baseline box", "box cannot be drawn from point"),
        ("evaluate --domain clean --baseline voronoi", "voronoi cannot be drawn from box: box and ellipse are drawn"),
        ("export --adapter no/where --merge {tmp}/w.pth", "no adapter in no/where"),
        ("export --adapter no/where", "give --merge FILE, --peft DIR, or both"),
        ("export --adapter no/where --base --merge {tmp}/w.pth", "--base goes with --peft"),
        ("adapt --domain clean --out {tmp}/a --config {tmp}/none.json", "cannot read the configuration"),
        ("adapt --domain clean --out {tmp}/a --config {tmp}/list.json", "is no configuration"),
        ("adapt --domain clean --out {tmp}/a --config {tmp}/odd.json", "did you mean 'lora.rank'"),
        ("cross --domain clean --seeds 0", "--seeds must be at least 1"),
        ("cross --domain clean --set prompt=box", "prompt is not a hyperparameter here"),
        ("evaluate --domain clean --prompt box --splitt test", "unrecognized arguments"),
        ("adapt --domain clean --out {tmp}/a --set lora.rnk=3", "did you mean 'lora.rank'"),
        ("evaluate --domain clean --prompt grid", "grid is no label of a person's"),
        ("adapt --domain clean --prompt grid --method supervised --out {tmp}/a", "supervised needs the masks"),
        ("adapt --domain clean --prompt grid --set val_prompt=grid --out {tmp}/a", "a grid cannot tell what is right"),
        ("adapt --domain clean --out {tmp}/a --method wesm", "did you mean 'wesam'"),
        ("adapt --domain clean --out {tmp}/a --steps 0", "steps must lie in"),
        ("adapt --domain clean --prompt point --out {tmp}/a --steps 1 --set loss.tightness=1", "needs given boxes"),
        (
            "adapt --domain clean --out {tmp}/a --set loss.label=1",
            "no effect on wesam: it is for wesam+",
        ),
        (
            "compare --domain clean --methods tent dept --set loss.pseudo=1",
            "no effect on tent and dept: it is for shot",
        ),
        ("adapt --domain clean --out {tmp}/file/a", "cannot write to"),
        ("predict no.png --box 1,2,3,4 --out {tmp}/m.png", "cannot read the image no.png"),
        ("predict {tmp}/i.png --box 1,2,3 --out {tmp}/m.png", "expected a box x0,y0,x1,y1, got '1,2,3'"),
        ("predict {tmp}/i.png --box 5,5,5,9 --out {tmp}/m.png", "is empty"),
        ("predict {tmp}/i.png --point 5,5,0 --out {tmp}/m.png", "at least one with 1"),
        ("predict {tmp}/i.png --point 5,5 --out {tmp}/none/m.png", "in one that is not there"),
        ("predict {tmp}/i.png --point 5,nan --out {tmp}/m.png", "expected a click"),
        ("predict {tmp}/i.png --polygon 5,5 9,9,9 7,5 --out {tmp}/m.png", "expected a corner x,y, got '9,9,9'"),
        ("predict {tmp}/i.png --polygon 5,5 9,9 5,5 --out {tmp}/m.png", "three different corners"),
        ("predict {tmp}/i.png --polygon 40,5 49,9 45,5 --out {tmp}/m.png", "a polygon lies beside the image"),
        ("predict {tmp}/i.png --point 5,5,0.5 --out {tmp}/m.png", "labelled 1"),
        (
            "predict {tmp}/i.png --box 30,2,35,9 --out {tmp}/m.png",
            "the box lies beside the image, which has 30 x 20",
        ),
        ("predict {tmp}/i.png --tight-box=1,-9,3,0 --out {tmp}/m.png", "the box lies beside the image"),
        (
            "predict {tmp}/i.png --point 5,5 5,25,0 --out {tmp}/m.png",
            "a click lies beside the image, which has 30 x 20",
        ),
        ("predict {tmp}/i.png --point=-1,5 --out {tmp}/m.png", "a click lies beside the image"),
        (
            "predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/../{tmp.name}/i.png",
            "would be overwritten: give another file",
        ),
        ("predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.png --overlay {tmp}/i.png", "i.png is read, and would be"),
        ("predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.png --json {tmp}/i.png", "i.png is read, and would be"),
        (
            "predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.png --overlay {tmp}/./m.png",
            "--out and --overlay are both {tmp}/m.png",
        ),
        ("predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.png --json {tmp}/m.png", "--json and --out are both"),
        ("predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.ico", "does not keep a mask's 255 and 0"),
        ("predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.JPEG", ".JPEG does not keep"),
        ("predict {tmp}/i.png --box 1,2,3,4 --out {tmp}/m.webp", "give a .png"),
        ("adapt --domain clean --out {tmp}/a --config {tmp}/odd.json --json {tmp}/odd.json", "odd.json is read, and"),
        ("predict {tmp}/deep.png --box 1,2,3,4 --out {tmp}/m.png", "more than 8 bits"),
        ("adapt --domain clean --out {tmp}/a --steps 2 --set steps=3", "--set steps=3: --steps 2 is given, too"),
        (
            "evaluate --domain clean --baseline box --adapter {tmp}/a",
            "--adapter changes answers to prompts, and --base",
        ),
        ("export --adapter {tmp}/a --peft {tmp}/p --merge {tmp}/p/adapter_model.safetensors", "lies in the"),
        ("evaluate --domain= --prompt box", "--domain is given nothing: is a variable of the shell not set?"),
        ("predict {tmp}/i.png --box 1,2,3,4 --crop 0.5 --out {tmp}/m.png", "crop must be 0"),
        ("evaluate --domain clean --json {tmp}/none/r.json", "in one that is not there"),
        ("adapt --domain clean --out {tmp}/a --set crop=2", "use --crop"),
        ("adapt --domain clean --out {tmp}/a --seed 4294967296", "seed must lie in"),
        ("show clean --images 0 --out {tmp}/s.png", "--images must be at least 1"),
        ("show clean --images 1 --out {tmp}/none/s.png", "in one that is not there"),
        ("", "COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "odd.json").write_text('{"lora.rnk": 4}')
    Image.new("RGB", (30, 20)).save(tmp_path / "i.png")
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.png")
    try:
        code = main(arguments.format(tmp=tmp_path).split())
    except SystemExit as e:
        code = e.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert message.format(tmp=tmp_path) in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_job_that_has_had_its_time_ends_as_with_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    assert guarded(end) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_argument_that_is_empty_is_no_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["check", ""], ["adapt", "--domain", "clean", "--out", ""]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        told = "--out" if "--out" in arguments else "the command"
        assert f"error: {told} is given nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt",
    [
        ["--box", "-5,-5,20,15"],
        ["--point", "-1,3", "8,8"],
        ["--polygon", "-1,3", "8,8", "2,9"],
        ["--box=-5.5,-5,20,15"],
    ],
)
def test_coordinates_may_be_negative(prompt: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "i.png")
    code = main(["predict", str(tmp_path / "i.png"), *prompt, "--out", str(tmp_path / "m.png")])
    assert "expected one argument" not in capsys.readouterr().err
    assert code in (0, 2)


def test_who_may_read_the_other_files_of_an_adapter_may_read_its_weights(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        sam = load_sam("nano")
        AdaptedSam(sam, LoraConfig()).save(tmp_path / "adapter")
        write_weights(sam, tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    written = [*(tmp_path / "adapter").iterdir(), tmp_path / "w.safetensors"]
    assert {oct(f.stat().st_mode)[-3:] for f in written} == {"644"}


def test_a_result_that_could_not_be_written_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # as root, all may be written
    with pytest.raises(SystemExit, match="2"):
        main(["domains", "--json", str(tmp_path / "x.json")])
    assert "x.json: permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:9", 2, "cuda:9 is not there: this machine's last GPU is cuda:1"),
        ("cuda:zzz", 2, "cuda:zzz is neither cpu nor cuda, nor cuda:N"),
        ("mps", 2, "mps is neither cpu nor cuda"),
        ("cuda:0", 0, "this machine has no GPU"),
        ("cuda:1", 2, "no adapter in no/where"),
        ("cpu", 0, "no adapter in no/where"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    command = ["predict", "i.png", "--box", "1,2,3,4", "--adapter", "no/where", "--out", "m.png", "--device", device]
    try:
        code = main(command)
    except SystemExit as e:
        code = e.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "check {d} --json {d}/train.json",
        "check {d}/train.json --json {d}/train.json",
        "check {d}@70/10/20 --json {d}/images/train-0.png",
        "check {d} --json {d}/../link.json",
        "show {d} --out {d}/images/train-0.png",
        "show {d}/train.json --out {d}/images/train-0.png",
        "evaluate --domain {d}+fog:3 --json {d}/test.json",
        "adapt --domain {d} --out {d}/../a --json {d}/val.json",
        "compare --domain {d} --json {d}/val.json",
        "cross --domain {d} --json {d}/val.json",
    ],
)
def test_nothing_of_a_domain_is_overwritten(
    arguments: str, coco_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco_folder.parent / "link.json").symlink_to(coco_folder / "train.json")
    before = {f: f.read_bytes() for f in coco_folder.rglob("*") if f.is_file()}
    assert main(arguments.format(d=coco_folder).split()) == 2
    error = capsys.readouterr().err
    assert "would be overwritten: give another file" in error
    assert error.count("\n") == 1
    assert {f: f.read_bytes() for f in coco_folder.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_nothing_that_a_domain_links_to_is_overwritten(
    form: str, coco_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (coco_folder / "images").rename(tmp_path / "store")
    (coco_folder / "images").symlink_to(tmp_path / "store")
    before = {f: f.read_bytes() for f in (tmp_path / "store").iterdir()}
    for out in (coco_folder / "images/train-0.png", tmp_path / "store/train-0.png"):
        assert main(["show", form.format(coco_folder), "--out", str(out)]) == 2
        assert "would be overwritten: give another file" in capsys.readouterr().err
    assert {f: f.read_bytes() for f in (tmp_path / "store").iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    ["check {long}", "evaluate --domain {d} --adapter {long}/a", "evaluate --domain {d} --model {long}.pth",
     "show {d} --out {long}.png", "check {d} --json {long}"],
)  # fmt: skip
def test_a_path_that_cannot_be_looked_at_is_one_line(
    arguments: str, coco_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments.format(d=coco_folder, long="x" * 300).split())
    except SystemExit as e:
        code = e.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert "File name too long" in error
    assert error.count("\n") == 1


def test_new_files_may_be_written_into_a_domain(coco_folder: Path) -> None:
    assert main(["check", str(coco_folder), "--json", str(coco_folder / "report.json")]) == 0
    assert main(["show", str(coco_folder), "--images", "1", "--out", str(coco_folder / "sheet.png")]) == 0
    for _ in range(2):  # beside a listing it is not in the domain
        assert main(["check", f"{coco_folder}/train.json", "--json", str(coco_folder / "listing.json")]) == 0


def test_a_box_may_reach_beyond_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "i.png")
    for given in (["--box=-5,-5,40,10"], ["--point", "30,20"]):
        assert main(["predict", str(tmp_path / "i.png"), *given, "--out", str(tmp_path / "m.png")]) == 0


def test_the_next_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for file in (python, python.with_name("wesam")):
        file.touch(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.chdir(tmp_path)
    assert program("wesam") == ".venv/bin/wesam"
    monkeypatch.setenv("PATH", str(python.parent))
    assert program("wesam") == "wesam"


def test_words_are_taken_with_spaces_and_with_commas() -> None:
    parser = make_parser(COMMANDS)
    for given in (["tent", "wesam"], ["tent,wesam"], ["tent,", "wesam"]):
        assert parser.parse_args(["compare", "--domain", "clean", "--methods", *given]).methods == ["tent", "wesam"]


def test_a_log_is_told_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    watch = console.progress("evaluating")
    for n in range(10):
        now[0] = 12.0 * n
        watch(n, 10)
    assert capsys.readouterr().err.splitlines() == ["evaluating 3/10", "evaluating 6/10", "evaluating 9/10"]


def test_an_adaptation_that_is_stopped_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(reports: Any, folder: Path, *, objective: str, watch: Any) -> None:
        watch(next(iter(reports)), True)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "keep_best", stopped)
    assert main(["adapt", "--domain", "clean", "--set", "val_instances=1", "--out", str(tmp_path / "a")]) == 130
    told = f"{tmp_path / 'a'} holds an adapter that changes nothing; the same command with --overwrite begins again"
    assert told in capsys.readouterr().err


def test_a_folder_of_domains_names_them(coco_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(coco_folder.parent)]) == 1
    assert f"is no domain, but {coco_folder.name} in it is one" in capsys.readouterr().out
    assert main(["evaluate", "--domain", __file__, "--prompt", "box"]) == 2
    assert "is a file: a domain is a folder, or a COCO listing" in capsys.readouterr().err
