"""The command ``wesam``: models, fetch, domains, check, show, evaluate, predict, export; and those that train."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from wesam import training
from wesam.adapters import WEIGHTS_FILE, AdaptedSam, made_for
from wesam.anchor import Anchor
from wesam.console import guarded, line, progress, spare_files, table, write_json
from wesam.data import NOTES, PUBLISHED, SPLITS, Domain, Split, load_domain, located
from wesam.data.domain import Unusable, pixels_digest, told_shared
from wesam.data.images import read_image
from wesam.drawings import check_drawable
from wesam.errors import InputError, plainly
from wesam.evaluate import baseline, crop_of, evaluate, predict
from wesam.export import export_peft
from wesam.found import adapter_folder
from wesam.methods import method_preset
from wesam.options import Command, given_domain, make_parser, spare
from wesam.overlay import contact_sheet, overlay
from wesam.prompts import Prompts
from wesam.sam import REGISTRY, describe, fetch_model, find_model, kind_of, load_sam, write_weights

SMALL = 0.1
"""Of the image's longer side: instances below it are a few pixels long to a model, as nuclei in microscopy are."""

EXACT = ("PNG", "TIFF", "BMP", "DIB", "PPM", "PCX", "SGI", "DDS", "IM", "TGA", "JPEG2000")
"""Formats, as Pillow calls them, that keep every pixel of a mask as it is; others blur it, or change its size."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = make_parser(COMMANDS).parse_args(arguments)

    def run() -> int | None:
        spare(args)
        code: int | None = args.run(args)
        return code

    return guarded(run)


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
    shared: list[str] = []
    rows: list[dict[str, Any]] = []
    domain: Domain | None = None
    try:
        domain = load_domain(located(args.domain, args.data))
    except InputError as e:
        fatal = str(e).splitlines()
        domain = e.rest if isinstance(e, Unusable) else None
    left_out = domain.left_out if domain else ()
    if domain:
        keys: dict[str, dict[bytes, str]] = {name: {} for name in domain.splits}
        for name, split in domain.splits.items():
            rows.append({"split": name or "all", "images": len(split), **_told(name, split, fatal, keys[name])})
        line("")
        shared = [told for one, other in combinations(keys, 2) if (told := told_shared(one, other, keys))]
    for fault in fatal:
        print(f"error: {fault}")
    for fault in shared:
        print(f"shared: {fault}")
    for fault in left_out:
        print(f"left out: {fault}")
    if rows:
        print(table(rows))
        medians = [r["median_side"] for r in rows if r["median_side"] is not None]
        if medians:
            print("median_side: half of the instances are shorter than this share of their image's longer side")
        if medians and min(medians) < SMALL:
            print(
                "many instances are small: a SAM may see them better in windows around the prompts; compare "
                f"wesam evaluate --domain {args.domain} --split val --instances 4 with and without --crop 2"
            )
    verdict = "unusable" if fatal else "usable"
    disjoint = f", but {len(shared)} pairs of its splits share images" if shared else ""
    print(f"{args.domain} is {verdict}: {len(fatal)} errors, {len(left_out)} annotations or images left out{disjoint}")
    write_json(
        args.json, {"domain": args.domain, "errors": fatal, "shared": shared, "left_out": left_out, "splits": rows}
    )
    return 1 if fatal else 0


def _told(name: str, split: Split, fatal: list[str], keys: dict[bytes, str]) -> dict[str, Any]:
    """What a split holds, all of it read; a line for each thing that is wrong goes into ``fatal``, each image's key by
    the digest of its pixels into ``keys``.
    """
    instances, sides = 0, [torch.zeros(0)]
    for i in range(len(split)):
        line(f"reading {name} {i + 1}/{len(split)}")
        try:
            sample = split.read(i)
        except InputError as e:
            fatal += str(e).splitlines()
            continue
        keys[pixels_digest(sample)] = sample.key
        instances += len(sample)
        if (boxes := sample.boxes) is not None:
            sides.append((boxes[:, 2:] - boxes[:, :2]).amax(1) / max(sample.image.shape[1:]))
    known = torch.cat(sides)
    return {"instances": instances, "median_side": float(known.median()) if len(known) else None}


def _show(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise InputError(f"--images must be at least 1, got {args.images}")
    domain = given_domain(args)
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
    if args.instances < 0:
        raise InputError(f"--instances must be at least 1, or 0 for all, got {args.instances}")
    domain = given_domain(args)
    split = domain.scored(args.split, args.instances)
    if not args.label_free:
        _ = split[0].masks  # without them there is no mIoU
    if args.baseline:
        for kind in args.prompt:
            check_drawable(args.baseline, kind)
        if args.label_free or args.adapter:
            option = "--label-free scores" if args.label_free else "--adapter changes"
            raise InputError(f"{option} answers to prompts, and --baseline gives none")
        model, name, crop = None, f"{args.baseline} (no model)", 0.0
    else:
        model, name = _model(args)
        crop = crop_of(model, args.crop)
    rows = []
    for kind in args.prompt:
        watch = progress(f"evaluating with {kind} prompts")
        if model:
            scores = evaluate(model, split, kind, crop=crop, label_free=args.label_free, progress=watch)
        else:
            scores = baseline(args.baseline, split, kind)
        rows.append({
            "domain": domain.name, "model": name, "adapter": args.adapter,
            "prompt": kind, "split": args.split, "images": scores.images, "instances": scores.instances,
            **scores.known(), **({"crop": crop} if crop else {}),
        })  # fmt: skip
    print(table(rows))
    write_json(args.json, rows if len(rows) > 1 else rows[0])


def _predict(args: argparse.Namespace) -> None:
    form = Image.registered_extensions().get(args.out.suffix.lower())
    if form and form not in EXACT:
        raise InputError(f"{args.out}: {args.out.suffix} does not keep a mask's 255 and 0 as they are: give a .png")
    model, _ = _model(args)
    image = torch.from_numpy(read_image(args.image).copy()).permute(2, 0, 1)
    prompts = _prompts(args)
    prompts.check_on((image.shape[1], image.shape[2]))
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
    if args.merge and args.peft and args.merge.resolve().is_relative_to(args.peft.resolve()):
        raise InputError(f"--merge {args.merge} lies in the folder of --peft, which is the adapter's: give another")
    folder = adapter_folder(args.adapter)
    name = args.model or made_for(folder)
    if args.merge:
        spare_files(args.merge, find_model(name), folder / WEIGHTS_FILE)
    sam = load_sam(name)
    model = AdaptedSam.load(sam, folder)
    if args.merge:
        write_weights(model.merged(), args.merge)
        kind, file = kind_of(sam), repr(str(args.merge))
        loaded = f"wesam.load_sam({file})"
        if kind in sam_model_registry and args.merge.suffix == ".pth":
            loaded = f"segment_anything.sam_model_registry[{kind!r}](checkpoint={file})"
        print(f"{args.merge} holds {name} with {args.adapter} in its weights; in Python: {loaded}")
        print("SamPredictor's coordinates are half a pixel of its resized image less than wesam's (docs/method.md)")
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


def _prompts(args: argparse.Namespace) -> Prompts:
    if args.point:
        return _points(args.point)
    return _polygon(args.polygon) if args.polygon else _box(args.box or args.tight_box, tight=bool(args.tight_box))


def _polygon(texts: list[str]) -> Prompts:
    corners = [_numbers(t, "a corner x,y", (2,)) for t in texts]
    if len(set(map(tuple, corners))) < 3:
        raise InputError(f"a polygon has three different corners at least, got {' '.join(texts)}")
    return Prompts(polygons=(torch.tensor(corners),))


def _box(text: str, *, tight: bool) -> Prompts:
    x0, y0, x1, y1 = _numbers(text, "a box x0,y0,x1,y1", (4,))
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"the box {text} is empty: x1 must be above x0 and y1 above y0")
    return Prompts(boxes=torch.tensor([[x0, y0, x1, y1]]), tight=tight)


def _points(texts: list[str]) -> Prompts:
    clicks = [_numbers(t, "a click x,y or x,y,0 or x,y,1", (2, 3)) for t in texts]
    labels = [c[2] if len(c) == 3 else 1 for c in clicks]
    if not set(labels) <= {0, 1} or 1 not in labels:
        raise InputError("clicks are labelled 1 (on the object) or 0 (beside it), at least one with 1")
    return Prompts(points=torch.tensor([[c[:2] for c in clicks]]), point_labels=torch.tensor([labels]).int())


def _numbers(text: str, what: str, counts: tuple[int, ...]) -> list[float]:
    try:
        values = [float(v) for v in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(map(math.isfinite, values)):
        raise InputError(f"expected {what}, got {text!r}")
    return values


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as e:
        raise InputError(f"cannot write {path}: {plainly(e)}") from None


COMMANDS: dict[str, Command] = {
    "models": _models, "fetch": _fetch, "domains": _domains, "check": _check, "show": _show, "evaluate": _evaluate,
    "adapt": training.run_adapt, "compare": training.run_compare, "cross": training.run_cross,
    "bench step": training.run_bench_step, "bench memory": training.run_bench_memory,
    "predict": _predict, "export": _export,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
