"""An adapter's card: what it is, how good, how it came about and how it is used, as Markdown from plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from shlex import quote

from tuning.plan import WORDS
from wesam.drawings import DRAWINGS, DRAWN
from wesam.sam import model_names

REFERENCES = {
    **{name: DRAWINGS[kind] for name, kind in DRAWN.items()},
    "direct": "Direct: the model without an adapter",
    "paper": "the paper's hyperparameters",
    "": "**this adapter**",
    "supervised": "Supervised: adapted with true masks",
}
"""What a card's table of scores shows, in this order; the key begins the score's name, as in ``direct_test_miou``."""

LIMITS = """
- It is for the domain, the kind of prompt and the very weights named above; on other images it can be worse than the
  model without it.
- Scores are means over the images of one test split. The spread is that over training seeds alone: it says nothing
  about other images.
- The study chose it by its score on val. A champion is chosen among adapters by their scores on test: after many
  studies on one test split, the champion's score there flatters it.
"""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a card is made from."""

    domain: str
    run_id: str
    tags: Mapping[str, str]
    """Of the version: model, prompt, data, study, scores; versions and the commit."""
    scores: Mapping[str, float]
    """By name, as ``test_miou``, ``test_miou_sd``, ``direct_test_miou``; what is not known is absent."""
    config: Mapping[str, str]
    """Every hyperparameter."""
    base: str
    """The weights that it is for, by name and digest."""
    trials: int
    """Of the study, on this domain."""
    step: int | None
    """Of its training, at which it was best on val."""

    @property
    def judged_by(self) -> str:
        """The name of the score on test: ``miou`` or ``label_free``."""
        return judged_by(self.tags)


def judged_by(tags: Mapping[str, str]) -> str:
    """The name of the score that a version has on test: the one it was chosen by, or mIoU, or the label-free one."""
    names = [n for n in (tags.get("score", "miou"), "miou", "label_free") if f"test_{n}" in tags]
    return names[0] if names else "miou"


def score(value: float | None, spread: float | None = None) -> str:
    """A score in words, with its spread if that is known."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def summary(about: About) -> str:
    """A card's first lines, for where there is no room for more."""
    t, s, name = about.tags, about.scores, about.judged_by
    own = score(s.get(f"test_{name}"), s.get(f"test_{name}_sd"))
    direct, gap = s.get(f"direct_test_{name}"), s.get("gap_closed")
    text = (
        f"An adapter of {t.get('model', 'a SAM')} for the image domain {about.domain}, from {_labels(t)}. "
        f"{WORDS[name]} on test {own}"
    )
    if direct is not None:
        text += f"; without an adapter {direct:.3f}"
    drawn = best_drawn(s, name)
    if drawn and drawn[1] >= s.get(f"test_{name}", 0.0):
        text += f"; {REFERENCES[drawn[0]]}, which needs no model, {drawn[1]:.3f}"
    if gap is not None:
        text += f"; {100 * gap:.0f} % of the gap between Direct and Supervised"
    return text + "."


def best_drawn(scores: Mapping[str, float], name: str) -> tuple[str, float] | None:
    """What needs no model and is best on test by the score of this name: what it is called, and that score."""
    found = {kind: scores[f"{kind}_test_{name}"] for kind in DRAWN if f"{kind}_test_{name}" in scores}
    return max(found.items(), key=lambda f: f[1]) if found else None


def card(about: About) -> str:
    """The card."""
    t, s, name = about.tags, about.scores, about.judged_by
    rows = []
    for key, title in REFERENCES.items():
        full = f"{key}_test_{name}" if key else f"test_{name}"
        if full in s:
            rows.append((title, score(s[full], s.get(f"{full}_sd"))))
    seeds = json.loads(t.get("test_seeds", "1"))
    count = len(seeds) if isinstance(seeds, list) else seeds
    spread = f" ± is the standard deviation over {count} training seeds." if f"test_{name}_sd" in s else ""
    model = t.get("model", "nano")
    facts = {
        "domain": f"{about.domain} (data digest `{t.get('data', 'unknown')}`)",
        "method": about.config.get("method", "unknown"),
        "model": f"{model} (weights `{about.base}`)",
        "prompts": t.get("prompt", "unknown"),
        "shown": _shown(t.get("crop", about.config.get("crop", "0"))),
    }
    most = int(t.get("test_instances", "0"))
    few = f"Of each image at most {most} instances are scored.\n\n" if most else ""
    versions = ", ".join(f"{k.removeprefix('version.')} {v}" for k, v in sorted(t.items()) if k.startswith("version."))
    found = {
        "study": t.get("study", "unknown"),
        "MLflow run": about.run_id,
        "seed": t.get("seed", "unknown"),
        "commit": t.get("mlflow.source.git.commit", "unknown"),
        "versions": versions or "unknown",
    }
    return f"""# Adapter for {about.domain}

{summary(about)}

{_facts(facts)}

## Scores on test

{few}{_table(("", WORDS[name]), rows)}

{_gap(s)}{spread}{_own(s, count)}

## How it was chosen

{_chosen(about)} The study read test only after that.

{_facts(found)}

## How to use it

```
wesam {command(t, about.domain)}
```

```python
import wesam
from tuning.registry import best_adapter

model = best_adapter("{about.domain}"{_weights(", model=", model, repr)})
masks, iou = wesam.predict(model, image, {_prompts(_asked(t))})
```

{_transformers(about)}

## Limits
{LIMITS}
## Hyperparameters

{_table(("field", "value"), [(f"`{k}`", f"`{v}`") for k, v in sorted(about.config.items())])}
"""


def _chosen(about: About) -> str:
    """How the study found it, on val."""
    t = about.tags
    of = f" of {about.trials}" if about.trials else ""
    said = f"It comes from trial {t.get('trial', 'unknown')}{of} of a study"
    if (final := int(t.get("finalists", "0"))) > 1:
        said += f", one of the {final} that were best on val, which were trained again with another seed: "
        said += "on the mean of both trainings it was best"
    else:
        said += ", the best of them on val"
    val = t.get(f"val_{t.get('score', 'miou')}")
    by = f" Its configuration has {WORDS[t.get('score', 'miou')]} {float(val):.3f} on val." if val else ""
    step = f" The adapter is as it was after {about.step} steps." if about.step is not None else ""
    return f"{said}.{by}{step}"


def _labels(tags: Mapping[str, str]) -> str:
    kind = tags.get("prompt", "")
    if kind == "grid":
        return "no labels at all"
    named = {
        "box": "boxes", "tight-box": "boxes, to which masks are cut", "coarse": "rough polygons",
        "coarse-box": "rough boxes",
    }  # fmt: skip
    return named.get(kind, "clicks")


def _shown(crop: str) -> str:
    if not float(crop):
        return "the whole image"
    return f"a square around each prompt, {float(crop):g} times as long (crop {float(crop):g})"


def _own(scores: Mapping[str, float], seeds: int) -> str:
    """What sets the adapter itself apart from its configuration, whose scores are shown."""
    if not seeds or "adapter_test" not in scores:
        return ""
    again = "another seed" if seeds == 1 else f"{seeds} other seeds"
    return f" Its scores are those of its configuration, trained again with {again}; the adapter itself has " + (
        f"{scores['adapter_test']:.3f}."
    )


def _gap(scores: Mapping[str, float]) -> str:
    supervised = [name for name in scores if name.startswith("supervised_test_")]
    if "gap_closed" not in scores and supervised:
        more = " by more than its spread" if any(name.endswith("_sd") for name in supervised) else ""
        return f"Supervised is not above Direct{more}: there is no gap to close."
    if "gap_closed" not in scores:
        return "The share of the gap between Direct and Supervised is not known."
    return f"It closes {100 * scores['gap_closed']:.0f} % of the gap between Direct and Supervised."


def command(tags: Mapping[str, str], adapter: str) -> str:
    """The arguments of ``wesam`` with which an adapter, a folder or a domain's name, answers what it was made for.

    tags: the version's, as in :attr:`About.tags`.
    """
    prompt = _asked(tags)
    if prompt.startswith("point"):
        given = "--point X,Y"
    elif prompt == "coarse":
        given = "--polygon X0,Y0 X1,Y1 X2,Y2"
    else:
        given = f"--{'tight-box' if prompt == 'tight-box' else 'box'} X0,Y0,X1,Y1"
    return f"predict IMAGE {given} {asked_with(tags, adapter)} --out mask.png --overlay seen.png"


def _asked(tags: Mapping[str, str]) -> str:
    """The kind of prompt that it is asked with: of an adapter that was made without labels, that of val."""
    prompt = tags.get("prompt", "box")
    return tags.get("val_prompt", "box") if prompt == "grid" else prompt


def asked_with(tags: Mapping[str, str], adapter: str) -> str:
    """The options that name an adapter and, where that does not, its weights."""
    return f"--adapter {quote(adapter)}{_weights(' --model ', tags.get('model', 'nano'), quote)}"


def _weights(option: str, model: str, said: Callable[[str], str]) -> str:
    """The option with a model that is a file; a name is found by the adapter itself."""
    return "" if model in model_names() else option + said(model)


def _prompts(prompt: str) -> str:
    if prompt.startswith("point"):
        return "wesam.Prompts(points=points, point_labels=labels)"
    tight = ", tight=True" if prompt == "tight-box" else ""
    return "wesam.Prompts(polygons=polygons)" if prompt == "coarse" else f"wesam.Prompts(boxes=boxes{tight})"


def _transformers(about: About) -> str:
    if about.base.partition("-")[0] == "vit_t":
        return "transformers has no counterpart of this model."
    if about.config.get("train", "lora") != "lora":
        return "PEFT's own format is for LoRA alone, and this adapter has other weights: `wesam export --merge`."
    export = f"wesam export {asked_with(about.tags, about.domain)} --peft for-hf --base"
    more = "The same half pixel counts in segment_anything's own code, for what `wesam export --merge` writes."
    if float(about.tags.get("crop", "0")):
        more += " In both, each prompt is to be shown in a window of its own, as above."
    if _asked(about.tags) == "tight-box":
        more += " In both, masks are to be cut to their boxes, as wesam does it."
    return f"""With transformers and PEFT, after `{export}`:

```python
model = peft.PeftModel.from_pretrained(transformers.SamModel.from_pretrained("for-hf/base"), "for-hf")
processor = transformers.SamProcessor.from_pretrained("for-hf/base")
inputs = processor(image, input_boxes=[boxes], return_tensors="pt")  # or input_points
inputs["input_boxes"] -= 0.5  # wesam counts from the pixel's corner, SAM from its centre
```

{more}"""


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {k}: {v}" for k, v in facts.items())


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(" | ".join(("", *cells, "")).strip() for cells in (head, ("---", "---"), *rows))
