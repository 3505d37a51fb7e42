from __future__ import annotations

import pytest

from wesam.config import PRESETS, Config, preset
from wesam.errors import InputError


def test_defaults_are_the_published_values() -> None:
    flat = preset("paper").flat()
    published = {
        "optim.lr": 1e-4, "optim.weight_decay": 1e-4, "optim.warmup_steps": 250, "lora.rank": 4, "loss.focal": 20.0,
        "loss.focal_alpha": 0.8, "loss.focal_gamma": 2.0, "loss.temperature": 0.3, "teacher.decay": 0.0,
        "max_instances": 50, "optim.batch_size": 4, "teacher.cut_to_box": False, "loss.tightness": 0.0,
    }  # fmt: skip
    assert {k: flat[k] for k in published} == published


def test_every_preset_is_valid() -> None:
    for name in PRESETS:
        assert preset(name).replace(preset(name).flat()) == preset(name)


def test_texts_are_parsed_by_the_fields_type() -> None:
    config = Config().parse(["lora.rank=8", "optim.lr=3e-3", "teacher.cut_to_box=true", "lora.targets=qkv", "steps=5"])
    assert (config.lora.rank, config.optim.lr, config.teacher.cut_to_box) == (8, 3e-3, True)
    assert (config.lora.targets, config.steps) == ("qkv", 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora.ranks=8", "unknown hyperparameter 'lora.ranks': did you mean 'lora.rank'"),
        ("lora.rank", "expected path.to.field=value, got 'lora.rank'"),
        ("lora.rank=four", "lora.rank must be a whole number, got 'four'"),
        ("lora.rank=0", r"rank must lie in \[1, 256\], got 0"),
        ("optim.lr=nan", "lr must lie in"),
        ("lora.targets=qkw", "unknown targets 'qkw': did you mean 'qkv'"),
        ("teacher.cut_to_box=1", "cut_to_box must be true or false"),
        ("crop=0.5", "crop must be 0"),
        ("teacher.decay=1.5", r"decay must lie in \[0, 1\]"),
    ],
)
def test_wrong_values_are_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Config().parse([text])


def test_wrong_types_are_refused() -> None:
    with pytest.raises(InputError, match="rank must be a whole number"):
        Config().replace({"lora.rank": 4.5})
    with pytest.raises(InputError, match="unknown preset 'papr': did you mean 'paper'"):
        preset("papr")
