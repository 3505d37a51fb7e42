"""Methods side by side on one domain: same data, prompts and budget, several seeds, the test split read once each."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from segment_anything.modeling import Sam

from wesam.adapt import adapt, keep_best
from wesam.adapters import AdaptedSam
from wesam.config import Config
from wesam.data.domain import Domain
from wesam.evaluate import baseline, evaluate
from wesam.methods import checked_method


def compare(
    sam: Sam,
    domain: Domain,
    configs: Mapping[str, Config],
    seeds: Iterable[int],
    *,
    watch: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Test mIoU of the trivial drawings, of the unadapted model and of each method's best checkpoint on val.

    configs: by the name of the method; all with one kind of prompt and one crop. Returns, per method, mean and
    standard deviation over the seeds and the list of all; and, where wesam and supervised are among them, the share of
    the gap between Direct and Supervised that WeSAM closes.
    """
    test = domain.split("test")
    first = next(iter(configs.values()))
    prompt, crop = first.scored_with, first.crop
    for config in configs.values():
        checked_method(config)
        domain.check(config)
    row: dict[str, Any] = {
        "box_filled": baseline("box", test).objective,
        "ellipse": baseline("ellipse", test).objective,
    }
    row["direct"] = direct = evaluate(sam, test, prompt, crop=crop).objective
    watch("  ".join(f"{k} {v:.3f}" for k, v in row.items()))
    val = evaluate(sam, domain.split("val"), prompt, crop=crop)
    for name, config in configs.items():
        found: list[float] = []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                best = keep_best(adapt(sam, domain, config.replace({"seed": seed}), direct=val), Path(folder))
                found.append(evaluate(AdaptedSam.load(sam, Path(folder)), test, prompt).objective)
            watch(f"{name} seed {seed}: test mIoU {found[-1]:.3f} (val {best.val.objective:.3f} at step {best.step})")
        row[name] = statistics.mean(found)
        row[f"{name}_sd"] = statistics.stdev(found) if len(found) > 1 else 0.0
        row[f"{name}_all"] = found
    if {"wesam", "supervised"} <= row.keys() and row["supervised"] > direct:
        row["gap_closed"] = (row["wesam"] - direct) / (row["supervised"] - direct)
    return row
