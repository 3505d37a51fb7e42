"""What the command ``wesam`` can be told: its commands, their options, and what these mean."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch

from wesam import __version__
from wesam.adapters import CONFIG_FILE, WEIGHTS_FILE
from wesam.config import PRESETS, Config, Objective, PromptKind
from wesam.console import DOMAIN_HELP, PROMPT_HELP, Parser, Words, json_file, picture_file, spare_files
from wesam.data import NOTES, SPLITS, Domain, load_domain, located, place_of
from wesam.data.files import Folder, is_address
from wesam.data.folders import PICTURES
from wesam.drawings import Drawing
from wesam.errors import InputError
from wesam.methods import METHODS
from wesam.sam import model_names

Command = Callable[[argparse.Namespace], int | None]
"""Does what its arguments say; returns an exit code other than 0, if any."""


def make_parser(run: Mapping[str, Command]) -> Parser:
    """The parser of the whole command line; run: what each command does, which becomes ``run`` of its arguments."""
    parser = Parser(prog="wesam", description="Adapt Segment Anything to an image domain from weak labels alone.")
    parser.add_argument("--version", action="version", version=f"wesam {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run[name])
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
        p.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=text)

    def size(p: argparse.ArgumentParser) -> None:
        p.add_argument("--instances", type=int, default=8, help="boxes an image (default: 8)")
        p.add_argument("--batch", type=int, default=1, help="images (default: 1)")
        p.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
            help="a hyperparameter, as in teacher.decay=0.99; the others are the paper's",
        )  # fmt: skip

    def result(p: argparse.ArgumentParser) -> None:
        p.add_argument("--json", type=json_file, metavar="FILE", help="write the result here too")

    result(command("models", "List the models."))
    p = command("fetch", "Download the weights of a model, check them, and keep them in $WESAM_HOME.")
    p.add_argument("model", metavar="MODEL", help=f"one of {', '.join(model_names())}")
    p = command("domains", "List the domains that have names; any folder is one too.")
    p.add_argument("--data", default="", metavar="ROOT", help="where published data sets lie (default: $WESAM_DATA)")
    result(p)

    p = command("check", "Read all of a domain and list what is wrong with it; exit code 1 if it is unusable.")
    data(p, "domain", prompt=None)
    result(p)

    p = command("show", "Draw images of a domain with their masks and weak labels on one sheet.")
    data(p, "domain")
    model(p, "whose clicks a grid's are; ")
    p.add_argument("--split", choices=SPLITS, default="train")
    p.add_argument("--images", type=int, default=12, help="(default: 12)")
    p.add_argument("--out", type=picture_file, required=True, metavar="SHEET.png")

    p = command("evaluate", "Score a model, with or without an adapter, on a split of a domain.")
    data(p, prompt=_kinds)
    model(p, adapted=True)
    p.add_argument("--split", choices=SPLITS, default="test")
    adapter(p)
    crop(p, "default: as it was adapted")
    p.add_argument(
        "--baseline", choices=get_args(Drawing),
        help="score what is drawn from the given labels instead of a model: the box filled, its ellipse, what is"
        " nearer to a click on the object than to one beside it, the polygon filled",
    )  # fmt: skip
    p.add_argument(
        "--instances", type=int, default=0, metavar="N",
        help="score at most N instances of each image (default: all)",
    )  # fmt: skip
    p.add_argument("--label-free", action="store_true", help="give the score that needs no masks, too")
    result(p)

    p = command("adapt", "Adapt a model to a domain; keep the adapter that is best on val.")
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
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="a hyperparameter, as in lora.rank=8",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the adapter")
    p.add_argument("--overwrite", action="store_true", help="replace the adapter that is in --out")
    result(p)

    p = command("compare", "Adapt with several methods and seeds; score each one's best checkpoint on test.")
    data(p)
    model(p)
    crop(p, "default: the preset's")
    p.add_argument("--methods", nargs="+", action=Words, default=["wesam", "supervised"], metavar="METHOD")
    runs(p, "method")
    result(p)

    text = "Adapt with each kind of weak label; score each one's best checkpoint on test with every kind of prompt."
    p = command("cross", text)
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
    p.set_defaults(run=run["bench step"])
    model(p)
    size(p)
    p.add_argument("--img", type=int, help="pixels of the side of the images: the model's own")
    p.add_argument("--steps", type=int, default=3, help="steps to take the median of (default: 3)")
    result(p)
    text = "The memory that one step needs on a GPU, reckoned from its allocations without one."
    p = kinds.add_parser("memory", help=text, description=text)
    p.set_defaults(run=run["bench memory"])
    p.add_argument("--model", choices=model_names(), default="nano", help="(default: nano)")
    size(p)
    result(p)

    p = command("predict", "Segment one object of an image.")
    p.add_argument("image", type=Path, metavar="IMAGE")
    model(p, adapted=True)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--box", metavar="X0,Y0,X1,Y1", help="its bounding box, in pixels")
    given.add_argument("--tight-box", metavar="X0,Y0,X1,Y1", help="a box that holds all of it: the mask is cut to it")
    given.add_argument(
        "--point", nargs="+", metavar="X,Y[,0|1]", help="clicks, in pixels; 1 on it (default), 0 beside it"
    )
    given.add_argument("--polygon", nargs="+", metavar="X,Y", help="the corners of its rough outline, in pixels")
    adapter(p)
    crop(p, "default: as it was adapted")
    p.add_argument(
        "--out", type=picture_file, required=True, metavar="MASK.png", help="the mask: 255 inside, 0 outside"
    )
    p.add_argument("--overlay", type=picture_file, metavar="PICTURE.png", help="the mask drawn over the image")
    result(p)
    text = "Write a model with its adapter for other programs: merged into plain weights, or for transformers and PEFT."
    p = command("export", text)
    model(p, adapted=True)
    adapter(p, required=True)
    p.add_argument(
        "--merge", type=Path, metavar="FILE",
        help="plain weights with the adapter's matrices added: .pth, as segment_anything's registry loads those of its"
        " models, or .safetensors",
    )  # fmt: skip
    p.add_argument("--peft", type=Path, metavar="DIR", help="the adapter as PEFT loads it on transformers' SamModel")
    p.add_argument(
        "--base", action="store_true",
        help="with --peft: write the SamModel itself too, in DIR/base, though the hub has it",
    )  # fmt: skip
    return parser


def spare(args: argparse.Namespace) -> None:
    """Raises InputError if a file to be written is one that is read, lies in the domain (:func:`spare_domain`), or is
    another one to be written.
    """
    given = {o: getattr(args, o, None) for o in ("json", "out", "overlay", "merge")}
    outs = {o: path for o, path in given.items() if path and not path.is_dir()}
    for (one, path), (other, same) in itertools.combinations(outs.items(), 2):
        if path.resolve() == same.resolve():
            raise InputError(f"--{one} and --{other} are both {path}: one would overwrite the other")
    read = [Path(f) for name in ("image", "model", "config") if (f := getattr(args, name, None))]
    if adapter := getattr(args, "adapter", None):
        read += [Path(adapter) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    for path in outs.values():
        spare_files(path, *read)
        if domain := getattr(args, "domain", None):
            spare_domain(path, domain, args.data)


def spare_domain(out: Path, domain: str, root: str = "") -> None:
    """Raises InputError if a file to be written is there already and lies in the folder of a domain, given as
    :func:`located` has it, or in one that this links to; of a domain that is given by its listing, if it is that or a
    picture in its folder.
    """
    if not out.exists():
        return
    try:
        given = place_of(located(domain, root))
    except InputError:  # there is no such domain, which is said where it is loaded
        return
    given = given.removeprefix("file://")
    place = Path(given)
    if given in NOTES or is_address(given):
        return
    if place.is_file():
        spare_files(out, place)
        place = place.parent.parent if place.parent.name == "annotations" else place.parent
        if out.suffix.lower() not in PICTURES:
            return
    links: set[Path] = set()
    with suppress(InputError):  # of a folder of too many files
        links = Folder(str(place)).places if place.is_dir() else links
    if any(out.resolve().is_relative_to(p) for p in (place.resolve(), *links)):
        raise InputError(f"{out} lies in the folder of {domain}, and would be overwritten: give another file")


def given_domain(args: argparse.Namespace) -> Domain:
    """The domain; says so if something of it is not used."""
    domain = load_domain(located(args.domain, args.data))
    if domain.left_out:
        print(
            f"{len(domain.left_out)} annotations or images of {args.domain} are left out: wesam check lists them",
            file=sys.stderr,
        )
    return domain


def _device(text: str) -> str:
    """What ``--device`` is given, if it is there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return "cuda" if count else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text} is neither cpu nor cuda, nor cuda:N for one of several GPUs")
    if device.type == "cuda" and not count:
        raise argparse.ArgumentTypeError("this machine has no GPU that PyTorch can use")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{text} is not there: this machine's last GPU is cuda:{count - 1}")
    return text


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
