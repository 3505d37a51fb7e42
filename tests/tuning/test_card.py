"""An adapter's card, from plain data."""

from __future__ import annotations

from typing import Any

from tuning.card import About, card, summary

TAGS = {
    "model": "vit_b", "prompt": "box", "val_prompt": "box", "data": "abc", "study": "s", "trial": "7", "seed": "5",
    "crop": "2.0", "score": "miou", "val_miou": "0.71", "test_miou": "0.7", "test_miou_sd": "0.012", "test_seeds": "3",
    "version.torch": "2", "mlflow.source.git.commit": "c0ffee",
}  # fmt: skip
SCORES = {
    "test_miou": 0.7, "test_miou_sd": 0.012, "box_filled_test_miou": 0.3, "ellipse_test_miou": 0.4,
    "direct_test_miou": 0.6, "paper_test_miou": 0.65, "supervised_test_miou": 0.8, "supervised_test_miou_sd": 0.02,
    "gap_closed": 0.5, "direct_val_miou": 0.61,
}  # fmt: skip


def about(**other: Any) -> About:
    """What an adapter's card is made from."""
    config = {"method": "wesam", "lora.rank": "4"}
    known: dict[str, Any] = {
        "tags": TAGS,
        "scores": SCORES,
        "config": config,
        "base": "vit_b-0123",
        "trials": 16,
        "step": 40,
    }
    return About(domain="nuclei", run_id="run1", **{**known, **other})


def test_a_card_says_what_it_is_how_good_and_how_it_came_about() -> None:
    told = card(about())
    table = told[told.index("## Scores") : told.index("## How it was chosen")]
    rows = [line.split(" | ")[1].rstrip(" |") for line in table.splitlines() if line.startswith("| ")][2:]
    assert rows == ["0.300", "0.400", "0.600", "0.650", "0.700 ± 0.012", "0.800 ± 0.020"]
    assert "50 % of the gap" in told
    assert "± is the standard deviation over 3 training seeds" in told
    for fact in ("trial 7 of 16 of a study, the best of them on val",
                 "after 40 steps", "`vit_b-0123`", "mIoU 0.710", "run1", "c0ffee", "torch 2",
                 "`abc`", "study: s", "seed: 5", "| `lora.rank` | `4` |",
                 "a square around each prompt, 2 times", "boxes"):  # fmt: skip
        assert fact in told
    assert "0.610" not in told, "Direct on val is no score on test"
    scores = {name: s for name, s in SCORES.items() if name != "gap_closed"}
    assert "Supervised is not above Direct by more than its spread" in card(about(scores=scores))
    for use in ("wesam predict", 'best_adapter("nuclei")', "SamModel.from_pretrained"):
        assert use in told


def test_a_card_says_how_one_of_several_good_trials_was_chosen_and_what_was_scored() -> None:
    told = card(about(tags={**TAGS, "finalists": "3", "test_instances": "16"}))
    assert "trial 7 of 16 of a study, one of the 3 that were best on val, which were trained again" in told
    assert "the best of them on val" not in told
    assert "at most 16 instances are scored" in told
    assert "instances are scored" not in card(about(tags={**TAGS, "finalists": "0", "test_instances": "0"}))


def test_a_card_for_tight_boxes_says_that_masks_are_cut_to_them() -> None:
    told = card(about(tags={**TAGS, "prompt": "tight-box"}))
    for said in ("boxes, to which masks are cut", "--tight-box X0,Y0,X1,Y1", "wesam.Prompts(boxes=boxes, tight=True)"):
        assert said in told


def test_what_a_card_tells_to_run_names_the_weights_and_is_told_where_it_works() -> None:
    told = card(about(tags={**TAGS, "model": "/a b/mine.pth"}))
    assert "best_adapter(\"nuclei\", model='/a b/mine.pth')" in told
    assert "wesam predict IMAGE --box X0,Y0,X1,Y1 --adapter nuclei --model '/a b/mine.pth' --out" in told
    assert "wesam export --adapter nuclei --model '/a b/mine.pth' --peft" in told
    assert "no counterpart" in card(about(base="vit_t-0123", tags={**TAGS, "model": "/a/mine.pt"}))
    assert "--box X0,Y0,X1,Y1" in card(about(tags={**TAGS, "prompt": "coarse-box"}))
    norms = card(about(config={"method": "tent", "train": "norms"}))
    assert "--peft" not in norms
    assert "`wesam export --merge`" in norms


def test_what_is_not_known_is_not_said() -> None:
    tags = {"test_label_free": "0.5", "score": "label_free", "prompt": "point", "model": "vit_t"}
    unknown = about(tags=tags, scores={"test_label_free": 0.5}, config={}, trials=0, step=None, base="vit_t")
    told = card(unknown)
    assert "label-free score on test 0.500" in summary(unknown)
    assert "± is" not in told
    assert "is not known" in told
    assert "Supervised: adapted" not in told
    assert "transformers has no counterpart" in told
    assert "--point X,Y" in told


def test_the_adapter_itself_is_told_apart_from_its_configuration_trained_again() -> None:
    assert "with 3 other seeds; the adapter itself has 0.720." in card(about(scores={**SCORES, "adapter_test": 0.72}))
    assert "the adapter itself" not in card(about())


def test_seeds_may_be_listed() -> None:
    assert "over 2 training seeds" in card(about(tags={**TAGS, "test_seeds": "[0.69, 0.71]"}))


def test_a_card_says_what_needs_no_model_and_is_as_good() -> None:
    assert "which needs no model" not in summary(about())
    told = summary(about(scores={**SCORES, "ellipse_test_miou": 0.75}))
    assert "ellipse in the box, which needs no model, 0.750" in told


def test_a_card_asks_with_the_prompts_that_it_was_chosen_with() -> None:
    told = card(about(tags={**TAGS, "prompt": "grid", "val_prompt": "point"}))
    assert "--point X,Y" in told
    assert "wesam.Prompts(points=points" in told
    told = card(about(tags={**TAGS, "prompt": "coarse", "crop": "0"}))
    assert "wesam predict IMAGE --polygon X0,Y0 X1,Y1 X2,Y2 --adapter" in told
    assert "wesam.Prompts(polygons=polygons)" in told
    assert "to be cut to their boxes" not in told
    assert "in a window of its own" not in told
    told = card(about(tags={**TAGS, "prompt": "tight-box"}))
    assert "to be cut to their boxes" in told
    assert "in a window of its own" in told
