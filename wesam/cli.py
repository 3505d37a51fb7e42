"""The command ``wesam``: models, fetch, domains, check, show, evaluate, adapt, compare, cross, bench, predict,
export."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import Sam

from wesam.adapt import Report, adapt, checked, keep_best
from wesam.adapters import AdaptedSam, made_for
from wesam.anchor import Anchor
from wesam.bench import bench_step
from wesam.compare import compare, cross
from wesam.config import PRESETS, Config, Objective, PromptKind, method_preset, preset, read_config
from wesam.console import DOMAIN_HELP, PROMPT_HELP, Parser, guarded, json_file, table, write_json
from wesam.data import NOTES, PUBLISHED, SPLITS, Domain, Split, load_domain, located
from wesam.data.domain import Unusable
from wesam.data.images import read_image
from wesam.errors import InputError
from wesam.evaluate import baseline, evaluate, predict
from wesam.export import export_peft
from wesam.found import adapter_folder
from wesam.memory import reckon
from wesam.methods import METHODS
from wesam.overlay import contact_sheet, overlay
from wesam.prompts import Prompts
from wesam.sam import REGISTRY, describe, fetch_model, load_sam, model_names, random_sam, write_weights


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = _parser().parse_args(arguments)
    return guarded(lambda: args.run(args))


def _parser() -> Parser:
    parser = Parser(prog="wesam", description="Adapt Segment Anything to an image domain from weak labels alone.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    def model(p: argparse.ArgumentParser, use: str = "", adapted: bool = False) -> None:
        p.add_argument(
            "--model", default=None if adapted else "nano",
            help=f"{use}one of {', '.join(model_names())}, or a file with weights of one "
            f"(default: {'the one that the adapter is for, else ' if adapted else ''}nano)",
        )  # fmt: skip
        p.add_argument(
            "--device", type=_device, default=_device("auto"), help="cpu or cuda (default: cuda if it is there)"
        )

    def data(p: argparse.ArgumentParser, option: str = "--domain", prompt: Callable[[str], Any] | None = _kind) -> None:
        if option[0] == "-":
            p.add_argument(option, required=True, metavar="D", help=DOMAIN_HELP)
        else:
            p.add_argument(option, metavar="D", help=DOMAIN_HELP)
        p.add_argument(
            "--data", default="", metavar="ROOT", help="where published data sets lie (default: $WESAM_DATA)"
        )
        if prompt:
            several = "; several with commas" if prompt is _kinds else ""
            text = f"{PROMPT_HELP}{several} (default: box)"
            p.add_argument("--prompt", type=prompt, default=prompt("box"), metavar="KIND", help=text)

    def adapter(p: argparse.ArgumentParser, required: bool = False) -> None:
        p.add_argument(
            "--adapter", required=required, metavar="DIR|DOMAIN",
            help="an adapter's folder, or the domain whose champion is to be fetched",
        )  # fmt: skip

    def crop(p: argparse.ArgumentParser, default: str) -> None:
        p.add_argument(
            "--crop", type=_crop, metavar="K",
            help=f"show the model a square around each prompt, K times as long; 0: the whole image ({default})",
        )  # fmt: skip

    def most(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--max-instances", type=int, metavar="N",
            help="train on at most N instances of an image in a step, others in each (default: the preset's)",
        )  # fmt: skip

    def runs(p: argparse.ArgumentParser, what: str) -> None:
        p.add_argument("--steps", type=int, help=f"optimisation steps of every {what}")
        p.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default: 3)")
        most(p)
        text = f"a hyperparameter of every {what}"
        p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=text)

    def size(p: argparse.ArgumentParser) -> None:
        p.add_argument("--instances", type=int, default=8, help="boxes an image (default: 8)")
        p.add_argument("--batch", type=int, default=1, help="images (default: 1)")
        p.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE",
            help="a hyperparameter, as in teacher.decay=0.99; the others are the paper's",
        )  # fmt: skip

    def result(p: argparse.ArgumentParser) -> None:
        p.add_argument("--json", type=json_file, metavar="FILE", help="write the result here too")

    result(command("models", _models, "List the models."))
    p = command("fetch", _fetch, "Download the weights of a model, check them, and keep them in $WESAM_HOME.")
    p.add_argument("model", metavar="MODEL", help=f"one of {', '.join(model_names())}")
    p = command("domains", _domains, "List the domains that have names; any folder is one too.")
    p.add_argument("--data", default="", metavar="ROOT", help="where published data sets lie (default: $WESAM_DATA)")
    result(p)

    p = command("check", _check, "Read all of a domain and list what is wrong with it; exit code 1 if it is unusable.")
    data(p, "domain", prompt=None)
    result(p)

    p = command("show", _show, "Draw images of a domain with their masks and weak labels on one sheet.")
    data(p, "domain")
    model(p, "whose clicks a grid's are; ")
    p.add_argument("--split", choices=SPLITS, default="train")
    p.add_argument("--images", type=int, default=12, help="(default: 12)")
    p.add_argument("--out", type=Path, required=True, metavar="SHEET.png")

    p = command("evaluate", _evaluate, "Score a model, with or without an adapter, on a split of a domain.")
    data(p, prompt=_kinds)
    model(p, adapted=True)
    p.add_argument("--split", choices=SPLITS, default="test")
    adapter(p)
    crop(p, "default: as it was adapted")
    p.add_argument(
        "--baseline", choices=("box", "ellipse"), help="score this drawing of the given box instead of a model"
    )
    p.add_argument("--label-free", action="store_true", help="give the score that needs no masks, too")
    result(p)

    p = command("adapt", _adapt, "Adapt a model to a domain; keep the adapter that is best on val.")
    data(p)
    model(p)
    p.add_argument("--method", help=f"one of {', '.join(METHODS)} (default: the preset's, else wesam)")
    crop(p, "default: the preset's")
    start = p.add_mutually_exclusive_group()
    start.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: the model's own)")
    start.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON, as with every adapter fetched or made; options win over it",
    )
    p.add_argument("--steps", type=int, help="optimisation steps")
    p.add_argument(
        "--objective", choices=get_args(Objective), default="auto",
        help="what the best step is chosen by on val; auto: mIoU, but label-free without masks (default: auto)",
    )  # fmt: skip
    most(p)
    p.add_argument("--seed", type=int, help="(default: 0, or that of --config)")
    p.set_defaults(prompt=None)
    p.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a hyperparameter, as in lora.rank=8"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the adapter")
    result(p)

    p = command("compare", _compare, "Adapt with several methods and seeds; score each one's best checkpoint on test.")
    data(p)
    model(p)
    crop(p, "default: the preset's")
    p.add_argument("--methods", nargs="+", default=["wesam", "supervised"], metavar="METHOD")
    runs(p, "method")
    result(p)

    text = "Adapt with each kind of weak label; score each one's best checkpoint on test with every kind of prompt."
    p = command("cross", _cross, text)
    data(p, prompt=None)
    p.add_argument(
        "--prompts", type=_kinds, default=_kinds("box,point,coarse"), metavar="KIND,...",
        help=f"{PROMPT_HELP} (default: box,point,coarse)",
    )  # fmt: skip
    model(p)
    p.add_argument("--method", default="wesam", help=f"one of {', '.join(METHODS)} (default: wesam)")
    crop(p, "default: the preset's")
    runs(p, "row")
    result(p)

    benches = commands.add_parser("bench", help="Measure what a step costs.", description="Measure what a step costs.")
    kinds = benches.add_subparsers(title="what", required=True, metavar="WHAT", parser_class=Parser)
    text = "One step of an adaptation, on random images with random boxes: seconds, operations, memory, parts."
    p = kinds.add_parser("step", help=text, description=text + " Without its weights, the model has random ones.")
    p.set_defaults(run=_bench_step)
    model(p)
    size(p)
    p.add_argument("--img", type=int, help="pixels of the side of the images: the model's own")
    p.add_argument("--steps", type=int, default=3, help="steps to take the median of (default: 3)")
    result(p)
    text = "The memory that one step needs on a GPU, reckoned from its allocations without one."
    p = kinds.add_parser("memory", help=text, description=text)
    p.set_defaults(run=_bench_memory)
    p.add_argument("--model", choices=model_names(), default="nano", help="(default: nano)")
    size(p)
    result(p)

    p = command("predict", _predict, "Segment one object of an image.")
    p.add_argument("image", type=Path, metavar="IMAGE")
    model(p, adapted=True)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--box", metavar="X0,Y0,X1,Y1", help="its bounding box, in pixels")
    given.add_argument(
        "--point", nargs="+", metavar="X,Y[,0|1]", help="clicks, in pixels; 1 on it (default), 0 beside it"
    )
    adapter(p)
    crop(p, "default: as it was adapted")
    p.add_argument("--out", type=Path, required=True, metavar="MASK.png", help="the mask: 255 inside, 0 outside")
    p.add_argument("--overlay", type=Path, metavar="PICTURE.png", help="the mask drawn over the image")
    result(p)
    text = "Write a model with its adapter for other programs: merged into plain weights, or for transformers and PEFT."
    p = command("export", _export, text)
    model(p, adapted=True)
    adapter(p, required=True)
    p.add_argument(
        "--merge", type=Path, metavar="FILE",
        help="plain weights with the adapter's matrices added: .pth, as segment_anything's registry loads them, or"
        " .safetensors",
    )  # fmt: skip
    p.add_argument("--peft", type=Path, metavar="DIR", help="the adapter as PEFT loads it on transformers' SamModel")
    p.add_argument(
        "--base", action="store_true",
        help="with --peft: write the SamModel itself too, in DIR/base, though the hub has it",
    )  # fmt: skip
    return parser


def _models(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for name, entry in REGISTRY.items():
        parameters, side = describe(name)
        rows.append(
            {"model": name, "parameters": parameters, "input": side, "note": entry.note,
             "weights": str(entry.path) if entry.path.is_file() else f"wesam fetch {name}: {entry.url}"}
        )  # fmt: skip
    print(table([{**r, "parameters": f"{r['parameters'] / 1e6:.1f} M", "input": f"{r['input']} px"} for r in rows]))
    write_json(args.json, rows)


def _fetch(args: argparse.Namespace) -> None:
    print(f"{args.model} is in {fetch_model(args.model)}")


def _domains(args: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for name, note in NOTES.items():
        domain = load_domain(name)
        counts = {s: len(domain.split(s)) for s in SPLITS}
        rows.append({"domain": name, **counts, "note": f"generated: {note}", "terms": "Apache-2.0", "url": None})
    for p in PUBLISHED.values():
        rows.append({"domain": p.name, **dict.fromkeys(SPLITS), "note": p.title, "terms": p.terms, "url": p.url})
    for row in rows[len(NOTES) :]:
        with suppress(InputError):  # it is not here
            domain = load_domain(located(row["domain"], args.data))
            row |= {s: len(domain.split(s)) for s in SPLITS}
    print(table([{k: v for k, v in r.items() if k != "url"} for r in rows]))
    print("images of train, val and test; published data sets are looked for under --data ROOT or $WESAM_DATA")
    write_json(args.json, rows)


def _check(args: argparse.Namespace) -> int:
    fatal: list[str] = []
    rows: list[dict[str, Any]] = []
    domain: Domain | None = None
    try:
        domain = load_domain(located(args.domain, args.data))
    except InputError as e:
        fatal = str(e).splitlines()
        domain = e.rest if isinstance(e, Unusable) else None
    left_out = domain.left_out if domain else ()
    if domain:
        for name, split in domain.splits.items():
            instances = 0
            for i in range(len(split)):
                _line(f"reading {name} {i + 1}/{len(split)}")
                try:
                    instances += len(split.read(i))
                except InputError as e:
                    fatal += str(e).splitlines()
            rows.append({"split": name, "images": len(split), "instances": instances})
        _line("")
    for line in fatal:
        print(f"error: {line}")
    for line in left_out:
        print(f"left out: {line}")
    if rows:
        print(table(rows))
    verdict = "unusable" if fatal else "usable"
    print(f"{args.domain} is {verdict}: {len(fatal)} errors, {len(left_out)} annotations left out")
    write_json(args.json, {"domain": args.domain, "errors": fatal, "left_out": left_out, "splits": rows})
    return 1 if fatal else 0


def _domain(args: argparse.Namespace) -> Domain:
    """The domain; says so if something of it is not used."""
    domain = load_domain(located(args.domain, args.data))
    if domain.left_out:
        print(
            f"{len(domain.left_out)} annotations or images of {args.domain} are left out: wesam check lists them",
            file=sys.stderr,
        )
    return domain


def _show(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise InputError(f"--images must be at least 1, got {args.images}")
    domain = _domain(args)
    split = domain.split(args.split)
    title = f"{domain.name}, {args.split}: {len(split)} images; given: {args.prompt}"
    sheet = contact_sheet(split, _given(args, split), title, images=args.images)
    _save(sheet, args.out)
    print(f"{args.out} shows {min(args.images, len(split))} of {len(split)} images")


def _given(args: argparse.Namespace, split: Split) -> Callable[[int], Prompts]:
    """The weak labels of an image of the split, by its number, in its pixels."""
    if args.prompt == "grid":
        grid = method_preset(args.model, "wesam").grid
        return Anchor(load_sam(args.model).to(args.device), split, "grid", grid=grid).given
    return lambda n: split[n].weak_labels(args.prompt)


def _evaluate(args: argparse.Namespace) -> None:
    domain = _domain(args)
    split = domain.split(args.split)
    if not args.label_free:
        _ = split[0].masks  # without them there is no mIoU
    if args.baseline:
        if len(args.prompt) > 1:
            raise InputError("--baseline draws in the given box: leave the other kinds of --prompt away")
        if args.label_free:
            raise InputError("--label-free scores answers to prompts, and --baseline gives none")
        model, name, crop = None, f"{args.baseline} (no model)", 0.0
    else:
        model, name = _model(args)
        crop = args.crop if args.crop is not None else getattr(model, "crop", 0.0)
    rows = []
    for kind in args.prompt:
        progress = _progress(f"evaluating with {kind} prompts")
        if model:
            scores = evaluate(model, split, kind, crop=crop, label_free=args.label_free, progress=progress)
        else:
            scores = baseline(args.baseline, split)
        rows.append({
            "domain": domain.name, "model": name, "adapter": args.adapter,
            "prompt": kind, "split": args.split, "images": scores.images, "instances": scores.instances,
            **scores.known(), **({"crop": crop} if crop else {}),
        })  # fmt: skip
    print(table(rows))
    write_json(args.json, rows if len(rows) > 1 else rows[0])


def _adapt(args: argparse.Namespace) -> None:
    sam, domain = load_sam(args.model).to(args.device), _domain(args)
    if args.config:
        start = read_config(args.config)
    else:
        start = preset(args.preset) if args.preset else method_preset(args.model, args.method or "wesam")
    config = start.replace(_changes(args)).parse(_set(args))
    checked(domain, config)
    vanished = _vanished(sam, domain, [config])
    _writable(args.out)
    curve: list[dict[str, float]] = []
    began = time.monotonic()

    def watch(report: Report, better: bool) -> None:
        done = f"step {report.step}/{report.steps}"
        if report.val is None:
            _line(f"{done}  loss {report.losses['total']:.3f}  {report.seconds:.2f} s/step")
            return
        curve.append({"step": report.step, **report.val.known(), **report.losses})
        _line("")
        kept = "  kept" if better else ""
        score = report.val.name(args.objective)
        what, value = "mIoU" if score == "miou" else score, report.val.value(args.objective)
        print(f"{done}  val {what} {value:.3f}  {time.monotonic() - began:.0f} s{kept}", flush=True)

    reports = adapt(sam, domain, config, label_free=args.objective == "label-free")
    best = keep_best(reports, args.out, objective=args.objective, watch=watch)
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
    write_json(args.out / "adaptation.json", record)
    write_json(args.json, row)


def _compare(args: argparse.Namespace) -> None:
    sam, domain = load_sam(args.model).to(args.device), _domain(args)
    changes = _changes(args)
    configs = {m: method_preset(args.model, m).replace(changes).parse(_set(args)) for m in args.methods}
    _vanished(sam, domain, configs.values())
    row = {
        "domain": domain.name, "model": args.model, "prompt": args.prompt, "crop": next(iter(configs.values())).crop,
        **compare(sam, domain, configs, _seeds(args), watch=lambda text: print(text, flush=True)),
    }  # fmt: skip
    print(table([{k: v for k, v in row.items() if not isinstance(v, list)}]))
    write_json(args.json, row)


def _cross(args: argparse.Namespace) -> None:
    sam, domain = load_sam(args.model).to(args.device), _domain(args)
    start = method_preset(args.model, args.method)
    configs = {k: start.replace({"prompt": k, **_changes(args)}).parse(_set(args)) for k in args.prompts}
    _vanished(sam, domain, configs.values())
    rows = cross(sam, domain, configs, _seeds(args), watch=lambda text: print(text, flush=True))
    columns = [k for k, v in rows[-1].items() if not isinstance(v, list)]
    print(table([{k: row.get(k) for k in columns} | {"trained_with": row["trained_with"] or "Direct"} for row in rows]))
    head = {"domain": domain.name, "model": args.model, "method": args.method}
    write_json(args.json, [{**head, **row} for row in rows])


def _seeds(args: argparse.Namespace) -> range:
    if args.seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {args.seeds}")
    return range(args.seeds)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration whose options are given."""
    fields = ("method", "prompt", "seed", "steps", "crop", "max_instances")
    return {k: v for k in fields if (v := getattr(args, k, None)) is not None}


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


def _size(args: argparse.Namespace) -> Config:
    """The paper's hyperparameters for what is to be measured."""
    for name in ("instances", "batch", "steps"):
        if getattr(args, name, 1) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(args, name)}")
    return preset("paper").parse([f"optim.batch_size={args.batch}", *_set(args)])


def _bench_memory(args: argparse.Namespace) -> None:
    config = _size(args)
    rows: list[dict[str, Any]] = []
    for precision in ("fp32", "bf16"):
        for on in (False, True):
            changed = config.replace({"compute.precision": precision, "compute.checkpointing": on})
            _line(f"{precision} ...")
            gib = reckon(REGISTRY[args.model].build, changed, args.instances)
            rows.append({
                "model": args.model, "batch": args.batch, "instances": args.instances, "precision": precision,
                "checkpointing": "yes" if on else "no", "gib": gib,
            })  # fmt: skip
    _line("")
    print(table(rows))
    print("reckoned: what CUDA and its kernels need for themselves comes on top, half a gibibyte or more")
    write_json(args.json, rows)


def _bench_step(args: argparse.Namespace) -> None:
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
    found = bench_step(sam, config, args.instances, args.steps, watch=_line)
    _line("")
    row = {
        "model": args.model, "img": side, "instances": args.instances, "batch": args.batch, "device": args.device,
        **dataclasses.asdict(found),
    }  # fmt: skip
    parts = row.pop("parts")
    print(table([row]))
    print(table([{"of a step": "share", **parts}]))
    write_json(args.json, {**row, "parts": parts, "config": config.flat(), "torch": torch.__version__})


def _predict(args: argparse.Namespace) -> None:
    model, _ = _model(args)
    image = torch.from_numpy(read_image(args.image).copy()).permute(2, 0, 1)
    prompts = _box(args.box) if args.box else _points(args.point)
    masks, iou = predict(model, image, prompts, crop=args.crop)
    _save(Image.fromarray(masks[0].numpy().astype(np.uint8) * 255), args.out)
    if args.overlay:
        _save(overlay(image, masks, prompts), args.overlay)
    row = {"mask": str(args.out), "pixels": int(masks[0].sum()), "predicted_iou": round(float(iou[0]), 3)}
    print(table([row]))
    write_json(args.json, row)


def _export(args: argparse.Namespace) -> None:
    if not args.merge and not args.peft:
        raise InputError("give --merge FILE, --peft DIR, or both")
    if args.base and not args.peft:
        raise InputError("--base goes with --peft DIR")
    folder = adapter_folder(args.adapter)
    name = args.model or made_for(folder)
    sam = load_sam(name)
    model = AdaptedSam.load(sam, folder)
    if args.merge:
        write_weights(model.merged(), args.merge)
        print(f"{args.merge} holds {name} with {args.adapter} in its weights")
    if args.peft:
        base = export_peft(sam, folder, args.peft, base=args.base)
        print(f"in Python: peft.PeftModel.from_pretrained(transformers.SamModel.from_pretrained({base!r}), "
              f"{str(args.peft)!r})")  # fmt: skip
        print("SamModel's coordinates are half a pixel of its resized image less than wesam's (docs/method.md)")
    if model.crop:
        print(f"the adapter was made with --crop {model.crop:g}, which neither says: show a model as much as that")


def _model(args: argparse.Namespace) -> tuple[Sam | AdaptedSam, str]:
    """The model that is asked for, with its adapter if there is one, and its name."""
    folder = adapter_folder(args.adapter) if args.adapter else None
    name: str = args.model or (made_for(folder) if folder else "nano")
    sam = load_sam(name).to(args.device)
    return AdaptedSam.load(sam, folder) if folder else sam, name


def _device(text: str) -> str:
    """What ``--device`` is given, if it is there."""
    there = torch.cuda.is_available()
    if text == "auto":
        return "cuda" if there else "cpu"
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda")
    if text != "cpu" and not there:
        raise argparse.ArgumentTypeError("this machine has no GPU that PyTorch can use")
    return text


def _numbers(text: str, what: str, counts: tuple[int, ...]) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(map(math.isfinite, values)):
        raise InputError(f"expected {what}, got {text!r}")
    return values


def _set(args: argparse.Namespace) -> list[str]:
    """The assignments of ``--set``, none of which may be of a field that has an option."""
    for text in args.set:
        if (path := text.partition("=")[0]) in ("method", "prompt", "seed", "crop"):
            raise InputError(f"--set {text}: {path} is not a hyperparameter here; use --{path} (or --methods, --seeds)")
    return list(args.set)


def _kind(text: str) -> PromptKind:
    try:
        return Config().parse([f"prompt={text}"]).prompt
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _kinds(text: str) -> list[PromptKind]:
    return list(dict.fromkeys(_kind(part.strip()) for part in text.split(",")))


def _crop(text: str) -> float:
    try:
        return Config().parse([f"crop={text}"]).crop
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _box(text: str) -> Prompts:
    x0, y0, x1, y1 = _numbers(text, "a box x0,y0,x1,y1", (4,))
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"the box {text} is empty: x1 must be above x0 and y1 above y0")
    return Prompts(boxes=torch.tensor([[x0, y0, x1, y1]]))


def _points(texts: list[str]) -> Prompts:
    clicks = [_numbers(t, "a click x,y or x,y,0 or x,y,1", (2, 3)) for t in texts]
    labels = [c[2] if len(c) == 3 else 1 for c in clicks]
    if not set(labels) <= {0, 1} or 1 not in labels:
        raise InputError("clicks are labelled 1 (on the object) or 0 (beside it), at least one with 1")
    return Prompts(points=torch.tensor([[c[:2] for c in clicks]]), point_labels=torch.tensor([labels]).int())


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as e:
        raise InputError(f"cannot write {path}: {e}") from None


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (probe := folder / ".probe").touch()
        probe.unlink()
    except OSError as e:
        raise InputError(f"cannot write to {folder}: {e.strerror}") from None


def _line(text: str) -> None:
    """A line that the next one overwrites; only where a person looks on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _progress(what: str) -> Callable[[int, int], None]:
    return lambda done, total: _line(f"{what} {done}/{total}" if done < total else "")


if __name__ == "__main__":
    sys.exit(main())
