"""How a report begins: what was searched, what was found and whether to use it, for who was not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from wesam.config import PromptKind
from wesam.drawings import DRAWN, drawable

Row = Mapping[str, Any]
"""A domain's line of a study's result."""

Verdict = Literal["adapter", "chance", "drawn", "model"]
"""What to use on a domain: the adapter; perhaps the adapter, for its gain is within the spread over seeds; what is
drawn from the given labels; the model as it is.
"""

WORTH = 0.01
"""What Direct has to gain by another way of asking for that to be worth a study."""

_DRAWN = {
    "box_filled": "the box filled", "ellipse": "an ellipse drawn in the box",
    "nearest_click": "what is nearer to a click on the object than to one beside it",
    "polygon_filled": "the given polygon filled",
}  # fmt: skip


@dataclass(frozen=True)
class Opening:
    """Plain text, in which commands stand between backticks."""

    searched: str
    found: list[str]
    """A line for each domain."""
    use: str


def opening(result: Mapping[str, Any], champions: Mapping[str, int]) -> Opening:
    """From a study's result. champions: the version that is each domain's champion, by the domain."""
    rows = [r for r in result["domains"] if "error" not in r]
    found = [_failed(r) if "error" in r else _found(r, result["prompt"]) for r in result["domains"]]
    return Opening(_searched(result), found, _use(rows, result["prompt"], champions))


def verdict(row: Row, prompt: PromptKind) -> Verdict:
    """What to use on the domain, by the scores on test."""
    if _better_drawn(row, prompt, given=True):
        return "drawn"
    if row["best_trial"] is None or row["best"] <= row["direct"]:
        return "model"
    return "chance" if row["best"] - row["direct"] < (row["best_sd"] or 0) else "adapter"


def _searched(result: Mapping[str, Any]) -> str:
    names = [r["domain"] for r in result["domains"]]
    jointly = any(r.get("joint") for r in result["domains"])
    what = "One configuration" if jointly else "The best adapter"
    many = len(names) > 1
    where = f"the domain{'s' if many else ''} {_and(names)}"
    seeds = result.get("seeds", 0)
    spread = f", and the spread is the standard deviation over {seeds} training seeds" if seeds > 1 else ""
    per = " for each" if many and not jointly else ""
    return (
        f"{what} of the model {result['model']} was sought for {where}, with {result['prompt']} prompts: "
        f"{result['trials']} trials{per} of at most {result['steps']} steps, chosen by their score on val. The scores "
        f"below are those on test, which was read only at the end{spread}; Direct is the model without an adapter."
    )


def _failed(row: Row) -> str:
    return f"{row['domain']}: the search failed ({row['error']})."


def _found(row: Row, prompt: PromptKind) -> str:
    direct, best, paper, spread = row["direct"], row["best"], row["paper"], row["best_sd"]
    unit = "points" if row["score"] != "label_free" else "points of the label-free score (no masks are known)"
    if row["best_trial"] is None:
        said = f"{row['domain']}: no adapter beat Direct ({direct:.3f})."
    else:
        shown = f"{best:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
        said = f"{row['domain']}: the best found has {shown}, {_against(best - direct, unit)} Direct ({direct:.3f})"
        if paper is not None:
            said += f" and {_against(best - paper, 'points')} the paper's hyperparameters ({paper:.3f})"
        said += f".{_doubt(best - direct, spread)}"
    if drawn := _better_drawn(row, prompt, given=True):
        said += f" But {_DRAWN[drawn]} has {row[drawn]:.3f} and needs no model."
    elif drawn := _better_drawn(row, prompt, given=False):
        said += f" But {_DRAWN[drawn]}, where one is given, has {row[drawn]:.3f} and needs no model."
    if better := _more_than_found(row):
        said += f" Without any training {compared(row['tried'], better)}."
    return said


def _against(gain: float, unit: str) -> str:
    return f"{100 * abs(gain):.1f} {unit} {'below' if gain < 0 else 'above'}"


def _doubt(gain: float, spread: float | None) -> str:
    """What speaks against a gain over Direct."""
    if gain <= 0:
        return " What was gained on val was not gained on test."
    if spread is None:
        return " Its spread over seeds is not known."
    if gain >= spread:
        return ""
    return f" The gain is smaller than the spread over seeds ({100 * spread:.1f} points): it may be luck."


def _better_drawn(row: Row, prompt: PromptKind, *, given: bool) -> str | None:
    """The best drawing, if it is as good as the best found and as Direct; given: of what is made from labels of this
    kind, or else of what is not.
    """
    known = [k for k in _DRAWN if row.get(k) is not None and drawable(DRAWN[k], prompt) == given]
    best = max(known, key=lambda k: row[k], default=None)
    return best if best and row[best] >= max(row["best"], row["direct"]) else None


def _use(rows: Sequence[Row], prompt: PromptKind, champions: Mapping[str, int]) -> str:
    by: dict[Verdict, list[str]] = {}
    for row in rows:
        by.setdefault(verdict(row, prompt), []).append(row["domain"])
    command = "`python -m tuning best {} --out DIR` writes it, with its configuration and its card."
    said = []
    if good := by.get("adapter"):
        named = good[0] if len(good) == 1 else "DOMAIN"
        said.append(f"Use the adapter for {_and(good)}: {command.format(named)}")
    if chance := by.get("chance"):
        said.append(f"For {_and(chance)} the adapter may help, or may not: more seeds or more test images would tell.")
    for row in rows:
        held = champions.get(row["domain"])
        if row["domain"] in (*(good or ()), *(chance or ())) and held not in (None, row["version"]):
            said.append(
                f"For {row['domain']} another adapter, version {held}, is champion: that is what `best` writes."
            )
    if drawn := by.get("drawn"):
        said.append(f"For {_and(drawn)} use no model at all: draw what is named above.")
    if plain := by.get("model"):
        said.append(f"For {_and(plain)} use the model as it is.")
    for row in rows:
        if better := _more_than_found(row):
            options = " or ".join(f"`{o}`" for o in better)
            said.append(f"But for {row['domain']} a study with {options} is likely to find more.")
    return " ".join(said)


def worth(tried: Row, least: float = WORTH) -> list[str]:
    """The options by which Direct gains at least so much, the best first."""
    others = tried["others"]
    return sorted((o for o in others if others[o] - tried["asked"] >= least), key=lambda o: -others[o])


def compared(tried: Row, options: Sequence[str]) -> str:
    """What Direct has with these options, and as it is asked, in words."""
    scores = _and([f"{tried['others'][o]:.3f} with `{o}`" for o in options])
    return (
        f"Direct has {scores} on {tried['images']} images of val, where it has {tried['asked']:.3f} as it is asked here"
    )


def _more_than_found(row: Row) -> list[str]:
    """The options by which Direct gains more on val than the search has found."""
    tried = row.get("tried")  # a study of before has none
    return worth(tried, max(WORTH, row["val"]["best"] - row["val"]["direct"])) if tried else []


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
