"""The command ``python -m tuning table``: one of the paper's tables, on any domains."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from tuning.tables import Kind, make_plan
from wesam.console import DOMAIN_HELP, PROMPT_HELP, Words
from wesam.errors import InputError
from wesam.methods import METHODS
from wesam.sam import model_names

TEXT = "Make one of the paper's tables: train what is missing, and write it as Markdown, LaTeX and JSON."

OPTIONS = ("domains", "name", "model", "prompts", "methods", "seeds", "trials", "steps", "crop", "data")
"""What the command line has of a table's plan, beside ``--set``."""


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of the command, beside those that all commands have."""
    p.add_argument("kind", metavar="TABLE", help=f"one of {', '.join(get_args(Kind))}")
    p.add_argument(
        "--domains", "--domain", nargs="+", action="extend", required=True, metavar="D", help=DOMAIN_HELP
    )  # fmt: skip
    p.add_argument("--data", default="", metavar="ROOT", help="where published data sets lie (default: $WESAM_DATA)")
    p.add_argument("--name", help="the table's name in MLflow (default: table-TABLE)")
    p.add_argument(
        "--model",
        default="nano",
        help=f"one of {', '.join(model_names())}, or a file with weights (default: nano)",
    )
    p.add_argument(
        "--prompts", nargs="+", action=Words, default=["box", "point", "coarse"], metavar="KIND",
        help=f"{PROMPT_HELP} (default: box point coarse)",
    )  # fmt: skip
    p.add_argument(
        "--methods", nargs="+", action=Words, metavar="METHOD",
        help=f"of {', '.join(METHODS)} (default: all in the table methods, wesam in the others)",
    )  # fmt: skip
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each cell (default: 3)")
    p.add_argument(
        "--trials", type=int, default=1, metavar="N",
        help="of a search for each row, domain and kind of prompt; 1 takes the methods' defaults (default: 1)",
    )  # fmt: skip
    p.add_argument("--steps", type=int, help="optimisation steps of a training (default: the model's)")
    p.add_argument(
        "--crop", type=float, metavar="K", help="show the model a square around each prompt, K times as long"
    )
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="fix a hyperparameter of all rows, as in lora.rank=8",
    )  # fmt: skip
    p.add_argument("--cpus-per-cell", type=int, default=1, metavar="N", help="threads of a training (default: 1)")
    p.add_argument(
        "--gpus-per-cell",
        type=float,
        default=1.0,
        metavar="G",
        help="a share puts several on a card (default: 1)",
    )
    p.add_argument("--no-run", action="store_true", help="train nothing: make the table of what MLflow has")
    p.add_argument(
        "--out", type=Path, default=Path("docs/results"), metavar="DIR",
        help="folder for TABLE.md, TABLE.tex and TABLE.json (default: docs/results)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Makes the table."""
    if args.cpus_per_cell < 1:
        raise InputError(f"--cpus-per-cell must be at least 1, got {args.cpus_per_cell}")
    if not 0 < args.gpus_per_cell <= 1:
        raise InputError(f"--gpus-per-cell must be above 0 and at most 1, got {args.gpus_per_cell}")
    plan = make_plan(args.kind, **{k: getattr(args, k) for k in OPTIONS}, fixed=args.set)
    if not args.no_run:
        print("starting MLflow, and Ray where something is to be trained ...", flush=True)
    from tuning import gather, runtime, table_page
    from tuning.tracking import Tracker

    runtime.quiet()
    tracker = Tracker(args.tracking_uri)
    try:
        cells = gather.collect(
            plan, tracker, compute=not args.no_run, cpus=args.cpus_per_cell, gpus=args.gpus_per_cell
        )  # fmt: skip
        page = table_page.markdown(plan, cells)
        files = {
            f"{plan.kind}.md": page,
            f"{plan.kind}.tex": table_page.latex(plan, cells),
            f"{plan.kind}.json": json.dumps(table_page.data(plan, cells), indent=1) + "\n",
        }
        _write(files, args.out)
        if not args.no_run:
            gather.keep(tracker, plan.name, files)
    finally:
        tracker.close()
        if not args.no_run:
            runtime.stop()
    print(f"\n{page}\nwritten to {', '.join(str(args.out / name) for name in files)}")


def _write(files: Mapping[str, str], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (out / name).write_text(text)
    except OSError as e:
        raise InputError(f"cannot write to {out}: {e.strerror}") from None
