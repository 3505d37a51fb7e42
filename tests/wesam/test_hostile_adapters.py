"""Adapter folders and checkpoints that are broken, or made to do harm: each is refused before it is loaded."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import Sam

import wesam
from wesam import adapters
from wesam.adapt import STATE_FILE, adapt
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE, AdaptedSam, made_for
from wesam.cli import main
from wesam.config import Config, LoraConfig
from wesam.data import Domain
from wesam.errors import InputError
from wesam.sam.nano import SHAPE

Spoil = Callable[[Path], None]


def said(**fields: Any) -> Spoil:
    """The configuration says something else."""

    def spoil(folder: Path) -> None:
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return spoil


def held(change: Callable[[dict[str, torch.Tensor]], Any], about: dict[str, str] | None = None) -> Spoil:
    """The file of the matrices holds something else."""

    def spoil(folder: Path) -> None:
        state = load_file(folder / WEIGHTS_FILE)
        change(state)
        save_file(state, folder / WEIGHTS_FILE, about)

    return spoil


def first(state: dict[str, torch.Tensor]) -> str:
    return sorted(state)[0]


def set_first(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({first(state): value(state[first(state)])})


def in_place_of(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content) and None


def sparse(folder: Path) -> None:
    """A terabyte that takes no room."""
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(2**40)


def promised(folder: Path) -> None:
    """Forty gigabytes in the header, eight bytes in the file."""
    head = json.dumps({"a": {"dtype": "F32", "shape": [100_000, 100_000], "data_offsets": [0, 40_000_000_000]}})
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(head)) + head.encode() + bytes(8))


def linked(name: str) -> Spoil:
    """The file is a link to one outside, which would do."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return spoil


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, ("unpickled",)


CASES: dict[str, tuple[Spoil, str]] = {
    "a rank beyond reason": (said(r=100_000_000), "rank must lie in"),
    "a rank of none": (said(r=0), "rank must lie in"),
    "a rank that is a text": (said(r="4"), "must be numbers"),
    "an alpha that is not finite": (said(lora_alpha=float("nan")), "alpha_ratio must lie in"),
    "an alpha too large for a float": (said(lora_alpha=10**4000), "too large"),
    "another rank than the file's": (said(r=2), "names or shapes differ"),
    "fewer matrices than said": (said(target_modules=adapters._TARGETS["encoder"]), "names or shapes differ"),
    "a pattern of one's own": (said(target_modules="(.+)+x"), "target_modules are not"),
    "a field nobody knows": (said(evil={"a": 1}), "'evil' is not known here"),
    "modules saved besides": (said(modules_to_save=["mask_decoder"]), "'modules_to_save' is not known here"),
    "another method of PEFT's": (said(peft_type="BONE"), "'peft_type' is not known here"),
    "code to import": (said(auto_mapping={"parent_library": "os"}), "'auto_mapping' is not known here"),
    "a path for a model": (said(base_model_name_or_path="../../etc/passwd"), "is no model's name"),
    "a file here for a model": (said(base_model_name_or_path="evil.pth"), "unknown model 'evil.pth'"),
    "no model": (said(base_model_name_or_path=None), "is no model's name"),
    "a list for a configuration": (in_place_of(CONFIG_FILE, b"[]"), "no object of fields"),
    "no text": (in_place_of(CONFIG_FILE, b"\xff\xfe\x00"), "decode"),
    "brackets without end": (in_place_of(CONFIG_FILE, b"[" * 100_000), "recursion"),
    "a long configuration": (in_place_of(CONFIG_FILE, b" " * 2**21), "too long"),
    "other shapes": (held(set_first(lambda t: t.repeat(2, 1))), "names or shapes differ"),
    "a key too many": (held(lambda s: s.update({"extra": torch.zeros(3)})), "names or shapes differ.*extra"),
    "a key too few": (held(lambda s: s.pop(first(s))), "names or shapes differ"),
    "not a number": (held(set_first(lambda t: t * torch.nan)), "not finite"),
    "infinity": (held(set_first(lambda t: t + torch.inf)), "not finite"),
    "numbers of another kind": (held(set_first(lambda t: t.double())), "holds F64, not one of"),
    "a crop that is no number": (held(lambda s: None, {"crop": "x"}), "crop must be a number"),
    "a crop beyond reason": (held(lambda s: None, {"crop": "1e9"}), "crop must lie in"),
    "a terabyte": (sparse, "has 1099511627776 bytes"),
    "gigabytes promised": (promised, "no safetensors file, or damaged"),
    "a header without end": (in_place_of(WEIGHTS_FILE, struct.pack("<Q", 2**60) + b"{}"), "no safetensors file"),
    "a pickle in disguise": (in_place_of(WEIGHTS_FILE, pickle.dumps(Evil())), "no safetensors file"),
    "an empty file": (in_place_of(WEIGHTS_FILE, b""), "no safetensors file"),
    "matrices that lie elsewhere": (linked(WEIGHTS_FILE), f"{WEIGHTS_FILE} is a link that leads out"),
    "a configuration that lies elsewhere": (linked(CONFIG_FILE), f"{CONFIG_FILE} is a link that leads out"),
}


@pytest.fixture
def folder(sam: Sam, tmp_path: Path) -> Path:
    AdaptedSam(sam, LoraConfig(rank=1, targets="qkv")).save(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line_before_anything_is_loaded(
    case: str, folder: Path, sam: Sam, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = CASES[case]
    spoil(folder)
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(wesam.cli, "load_sam", lambda model: sam)

    def load(*given: Any) -> None:
        raise AssertionError("it is loaded")

    monkeypatch.setattr(adapters, "_wrap", load)
    monkeypatch.setattr("pickle.load", load)
    monkeypatch.setattr("pickle.loads", load)
    assert main(["export", "--adapter", str(folder), "--merge", "merged.pth"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cannot read the adapter in ")
    assert re.search(message, line), line
    assert {f.name for f in folder.parent.iterdir()} <= {"adapter", f"outside-{CONFIG_FILE}", f"outside-{WEIGHTS_FILE}"}


def test_a_link_within_the_folder_and_a_linked_folder_are_read(folder: Path, sam: Sam) -> None:
    (folder / CONFIG_FILE).rename(folder / "real.json")
    (folder / CONFIG_FILE).symlink_to("real.json")
    (folder.parent / "link").symlink_to(folder)
    assert made_for(folder.parent / "link") == "nano"
    assert AdaptedSam.load(sam, folder.parent / "link").trainable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": torch.tensor(-1)}, "from step -1 of 3"),
        ({"step": torch.tensor(2**40)}, "from step 1099511627776 of 3"),
        ({"exp_avg.0": torch.zeros(1000, 1000)}, "has 401"),
        ({"exp_avg.0": torch.zeros(2, 2)}, r"names or shapes differ.*exp_avg\.0"),
        ({"teacher.9999": torch.zeros(1)}, r"names or shapes differ.*teacher\.9999"),
        ({"teacher.0": None}, r"names or shapes differ.*teacher\.0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_not_gone_on_with(
    change: dict[str, torch.Tensor | None], message: str, sam: Sam, camouflaged: Domain, tmp_path: Path
) -> None:
    changes = {"steps": 3, "eval_every": 3, "optim.batch_size": 1, "lora.rank": 1, "lora.targets": "qkv"}
    config = Config().replace({**changes, "max_instances": 1})
    start = next(adapt(sam, camouflaged, config, direct=wesam.Scores(1, 1, 0.0, 0.0, 0.0, 0.0)))
    start.save(tmp_path)
    state = {**load_file(tmp_path / STATE_FILE), **change}
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / STATE_FILE)
    with pytest.raises(InputError, match=f"cannot go on from .*{message}"):
        next(adapt(sam, camouflaged, config, resume=tmp_path))


def test_weights_that_say_they_are_huge_are_refused(tmp_path: Path) -> None:
    shape = {"side": 1024, "patch": 1, "width": 30_000, "depth": 3, "heads": 3, "window": 8, "whole": [], "channels": 9}
    for changed in ({}, {"depth": 10**9}, {"width": 2**70}):
        save_file(
            {f"{n}": torch.zeros(1) for n in range(5)},
            tmp_path / "w.safetensors",
            {SHAPE: json.dumps({**shape, **changed})},
        )
        with pytest.raises(InputError, match=r"w\.safetensors (does not hold|does not say|is of no model)"):
            wesam.load_sam(str(tmp_path / "w.safetensors"))
