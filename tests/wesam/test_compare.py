from __future__ import annotations

import sys

import pytest
from segment_anything.modeling import Sam

from wesam.compare import compare, train_once
from wesam.config import PromptKind
from wesam.data import Domain
from wesam.drawings import Drawing
from wesam.evaluate import baseline, evaluate
from wesam.methods import method_preset


def test_one_training_meets_test_with_several_prompts_and_after_given_steps(sam: Sam, camouflaged: Domain) -> None:
    few = {"steps": 4, "eval_every": 2, "optim.batch_size": 1, "max_instances": 2, "lora.rank": 2, "optim.lr": 5e-3}
    config = method_preset("nano", "supervised").replace(few)
    direct = evaluate(sam, camouflaged.split("val"), "box")
    found = train_once(sam, camouflaged, config, ["box", "point"], val=direct, after=[3, 4])
    assert list(found.curve) == [0, 2, 4]
    assert found.curve[0] == direct
    assert found.best.val.objective == max(s.objective for s in found.curve.values())
    assert set(found.test) == {"box", "point"}
    assert set(found.after) == {3, 4}
    if found.best.step == 4:
        assert found.after[4].objective == pytest.approx(found.test["box"].objective, abs=1e-4)
    assert found.parameters > 0
    assert found.seconds is not None
    assert not found.diverged


@pytest.mark.parametrize(
    ("prompt", "drawn"),
    [
        ("box", {"box_filled": "box", "ellipse": "ellipse"}),
        ("coarse-box", {"box_filled": "box", "ellipse": "ellipse"}),
        ("point", {"nearest_click": "voronoi"}),
        ("coarse", {"polygon_filled": "polygon"}),
    ],
)
def test_beside_methods_stands_what_can_be_drawn_from_the_given_labels(
    sam: Sam, camouflaged: Domain, prompt: PromptKind, drawn: dict[str, Drawing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["wesam.compare"], "_summary", lambda name, values: {name: 0.5})
    few = {"prompt": prompt, "val_instances": 1, "test_instances": 3}
    row = compare(sam, camouflaged, {"wesam": method_preset("nano", "wesam").replace(few)}, [])
    test = camouflaged.scored("test", 3)
    assert list(row) == [*drawn, "direct", "wesam"]
    assert {k: row[k] for k in drawn} == {k: baseline(d, test, prompt).objective for k, d in drawn.items()}


def test_so_many_instances_of_an_image_of_test_are_scored(sam: Sam, camouflaged: Domain) -> None:
    few = {"steps": 1, "optim.batch_size": 1, "max_instances": 1, "val_instances": 1}
    config, test = method_preset("nano", "wesam").replace(few), camouflaged.split("test")
    for most, expected in ((1, len(test)), (2, sum(min(2, len(s)) for s in test)), (0, sum(map(len, test)))):
        found = train_once(sam, camouflaged, config.replace({"test_instances": most}), ["box"])
        assert found.test["box"].instances == expected


def test_a_training_that_diverges_counts_with_what_it_had_reached(
    sam: Sam, camouflaged: Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*given: object) -> None:
        raise FloatingPointError("loss is not finite")

    monkeypatch.setattr(sys.modules["wesam.adapt"], "train", burst)
    config = method_preset("nano", "wesam").replace({"steps": 2, "optim.batch_size": 1})
    with pytest.raises(FloatingPointError):
        train_once(sam, camouflaged, config, [])
    found = train_once(sam, camouflaged, config, ["box"], after=[1, 2], forgiving=True)
    assert (found.diverged, found.best.step, found.seconds) == (True, 0, None)
    direct = pytest.approx(evaluate(sam, camouflaged.split("test"), "box").objective)
    assert found.test["box"].objective == direct
    assert {n: s.objective for n, s in found.after.items()} == {1: direct, 2: direct}
