"""The commands that train, or measure training: adapt, compare, cross, bench."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import Sam

from wesam.adapt import Report, adapt, checked, keep_best
from wesam.adapters import ABOUT, CONFIG_FILE, WEIGHTS_FILE
from wesam.bench import bench_step
from wesam.compare import compare, cross
from wesam.config import Config, preset, read_config
from wesam.console import line, table, write_json
from wesam.data import Domain
from wesam.errors import InputError
from wesam.memory import reckon
from wesam.methods import check_read, get_method, method_preset
from wesam.options import given_domain
from wesam.sam import REGISTRY, load_sam, random_sam

RECORD = "adaptation.json"
"""Beside an adapter when its adaptation is over: what it was made with, and its scores at each step."""


FIELDS = ("method", "prompt", "seed", "steps", "crop", "max_instances")
"""What of a configuration has options of its own."""

NEW = ".new-"
"""Prefix of the temporary folder, inside that of the old adapter, in which the new one is made."""


def run_adapt(args: argparse.Namespace) -> None:
    """Adapts a model to a domain and keeps the adapter that is best on val."""
    sam, domain = load_sam(args.model).to(args.device), given_domain(args)
    config = _configured(_start(args), args)
    check_read(config, [config.method])
    checked(domain, config)
    if args.objective in ("miou", "f1") and not domain.split("val")[0].has_masks:
        raise InputError(f"--objective {args.objective}: it is not known of {domain.name}, which has no masks on val")
    vanished = _vanished(sam, domain, [config])
    old = _ready(args.out, overwrite=args.overwrite)
    kept_step = 0
    curve: list[dict[str, float]] = []
    began = time.monotonic()

    def watch(report: Report, better: bool) -> None:
        nonlocal kept_step
        kept_step = report.step if better else kept_step
        done = f"step {report.step}/{report.steps}"
        if report.val is None:
            line(f"{done}  loss {report.losses['total']:.3f}  {report.seconds:.2f} s/step")
            return
        curve.append({"step": report.step, **report.val.known(), **report.losses})
        line("")
        kept = "  kept" if better else ""
        score = report.val.name(args.objective)
        what, value = "mIoU" if score == "miou" else score, report.val.value(args.objective)
        print(f"{done}  val {what} {value:.3f}  {time.monotonic() - began:.0f} s{kept}", flush=True)

    reports = adapt(sam, domain, config, label_free=args.objective == "label-free")
    try:
        with _place(args.out, old, lambda: kept_step > 0) as folder:
            best = keep_best(reports, folder, objective=args.objective, watch=watch)
    except KeyboardInterrupt:
        line("")
        if curve:
            kept = f"its adapter of step {kept_step}" if kept_step else "an adapter that changes nothing"
            kept = "the adapter of before" if old and not kept_step else kept
            print(f"{args.out} holds {kept}; the same command with --overwrite begins again", file=sys.stderr)
        raise
    row = {
        "domain": domain.name, "model": args.model, "method": config.method, "prompt": config.prompt,
        "crop": config.crop, "score": best.val.name(args.objective), "direct": best.direct.value(args.objective),
        "best": best.val.value(args.objective), "step": best.step,
        "adapter": str(args.out),
    }  # fmt: skip
    print(table([row]))
    if best.step == 0:
        print("no step was better on val than the unadapted model: the adapter changes nothing")
    record = {**row, "vanished": vanished, "config": config.flat(), "data": domain.digest, "curve": curve}
    write_json(args.out / RECORD, record)
    write_json(args.json, row)


def run_compare(args: argparse.Namespace) -> None:
    """Compares methods on a domain, over seeds."""
    sam, domain = load_sam(args.model).to(args.device), given_domain(args)
    configs = {m: _configured(method_preset(args.model, m), args) for m in args.methods}
    check_read(next(iter(configs.values())), configs)
    _vanished(sam, domain, configs.values())
    row = {
        "domain": domain.name, "model": args.model, "prompt": args.prompt, "crop": next(iter(configs.values())).crop,
        **compare(sam, domain, configs, _seeds(args), watch=lambda text: print(text, flush=True)),
    }  # fmt: skip
    print(table([{k: v for k, v in row.items() if not isinstance(v, list)}]))
    write_json(args.json, row)


def run_cross(args: argparse.Namespace) -> None:
    """Adapts with each kind of weak label and scores with each."""
    sam, domain = load_sam(args.model).to(args.device), given_domain(args)
    start = method_preset(args.model, args.method)
    configs = {k: _configured(start.replace({"prompt": k}), args) for k in args.prompts}
    check_read(next(iter(configs.values())), [args.method])
    _vanished(sam, domain, configs.values())
    rows = cross(sam, domain, configs, _seeds(args), watch=lambda text: print(text, flush=True))
    columns = [k for k, v in rows[-1].items() if not isinstance(v, list)]
    print(table([{k: row.get(k) for k in columns} | {"trained_with": row["trained_with"] or "Direct"} for row in rows]))
    head = {"domain": domain.name, "model": args.model, "method": args.method}
    write_json(args.json, [{**head, **row} for row in rows])


def run_bench_step(args: argparse.Namespace) -> None:
    """Measures one step of an adaptation."""
    config = _size(args)
    try:
        sam = load_sam(args.model)
    except InputError:
        if args.model not in REGISTRY:
            raise
        print(f"no weights of {args.model} here: random ones do for this", file=sys.stderr)
        sam = random_sam(args.model)
    side = sam.image_encoder.img_size
    if args.img not in (None, side):
        raise InputError(f"{args.model} takes images of {side} px, not of {args.img}")
    sam = sam.to(args.device)
    found = bench_step(sam, config, args.instances, args.steps, watch=line)
    line("")
    row = {
        "model": args.model, "img": side, "instances": args.instances, "batch": args.batch, "device": args.device,
        **dataclasses.asdict(found),
    }  # fmt: skip
    parts = row.pop("parts")
    print(table([row]))
    print(table([{"of a step": "share", **parts}]))
    write_json(args.json, {**row, "parts": parts, "config": config.flat(), "torch": torch.__version__})


def run_bench_memory(args: argparse.Namespace) -> None:
    """Reckons the memory that a step needs on a GPU."""
    config = _size(args)
    rows: list[dict[str, Any]] = []
    for precision in ("fp32", "bf16"):
        for on in (False, True):
            changed = config.replace({"compute.precision": precision, "compute.checkpointing": on})
            line(f"{precision} ...")
            gib = reckon(REGISTRY[args.model].build, changed, args.instances)
            rows.append({
                "model": args.model, "batch": args.batch, "instances": args.instances, "precision": precision,
                "checkpointing": "yes" if on else "no", "gib": gib,
            })  # fmt: skip
    line("")
    print(table(rows))
    print("reckoned: what CUDA and its kernels need for themselves comes on top, half a gibibyte or more")
    write_json(args.json, rows)


def _size(args: argparse.Namespace) -> Config:
    """The paper's hyperparameters for what is to be measured."""
    for name in ("instances", "batch", "steps"):
        if getattr(args, name, 1) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    return _configured(preset("paper").replace({"optim.batch_size": args.batch}), args, ())


def _seeds(args: argparse.Namespace) -> range:
    if args.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {args.seeds}")
    return range(args.seeds)


def _configured(start: Config, args: argparse.Namespace, fields: Sequence[str] = FIELDS) -> Config:
    """The configuration with what the options change: these fields' own, and ``--set`` for the others."""
    given = {k: v for k in fields if (v := getattr(args, k, None)) is not None}
    for text in args.set:
        if (path := text.partition("=")[0]) in ("method", "prompt", "seed", "crop"):
            raise InputError(f"--set {text}: {path} is not a hyperparameter here; use --{path} (or --methods, --seeds)")
        if path in ("steps", "max_instances") and path in given:
            raise InputError(f"--set {text}: --{path.replace('_', '-')} {given[path]} is given, too")
    return start.replace(given).parse(args.set)


def _vanished(sam: Sam, domain: Domain, configs: Iterable[Config]) -> int:
    """How many training instances are too small for the model, seen whole, to see; says so if there are any."""
    side = sam.image_encoder.img_size
    count = max(domain.vanished(c, side) for c in configs)
    if count:
        print(
            f"left out of training, less than a pixel wide or high at the model's {side} px: {count} instances;"
            " --crop 3 shows them larger",
            file=sys.stderr,
        )
    return count


def _start(args: argparse.Namespace) -> Config:
    """Where the configuration begins: a file, or a preset or the model's defaults, with what the method changes."""
    if args.preset:
        preset(args.preset)  # raises InputError for one that is not there
    if not args.config:
        return method_preset(args.preset or args.model, args.method or "wesam")
    found = read_config(args.config)
    if args.method in (None, found.method):
        return found
    return found.replace({"method": args.method, **get_method(args.method).defaults})


@contextmanager
def _place(out: Path, old: bool, learned: Callable[[], bool]) -> Iterator[Path]:
    """The folder in which the best adapter is kept until the end of the block: ``out`` itself or, if that has an old
    one, a folder in it, from which the new one comes into its place at the end.

    learned: whether the new one is of any use; if not, what ends the block early leaves the old one.
    """
    if not old:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix=NEW, dir=out) as folder:
        whole = False
        try:
            yield Path(folder)
            whole = True
        finally:
            if whole or learned():
                (out / RECORD).unlink(missing_ok=True)  # it would tell of another adapter
                for file in Path(folder).iterdir():
                    file.replace(out / file.name)


def _ready(folder: Path, *, overwrite: bool) -> bool:
    """Makes the folder for an adapter; returns whether it has one, which may go.

    Raises InputError if it cannot be written, or holds what would be overwritten: an adapter, if it may not go, or what
    others have written about one, such as a model card, which is not ours to remove.
    """
    kept = [name for name in (CONFIG_FILE, WEIGHTS_FILE, RECORD) if (folder / name).exists()]
    if kept and not overwrite:
        raise InputError(f"{folder} holds an adapter ({kept[0]}): give another --out, or --overwrite to replace it")
    if kept and (told := [name for name in ABOUT if (folder / name).exists()]):
        raise InputError(
            f"{folder} holds {told[0]}, which would tell of another adapter: give another --out, or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / ".probe").touch()
        probe.unlink()
        for left in folder.glob(f"{NEW}*"):  # of a process that was killed
            shutil.rmtree(left)
    except OSError as e:
        raise InputError(f"cannot write to {folder}: {e.strerror}") from None
    return bool(kept)
