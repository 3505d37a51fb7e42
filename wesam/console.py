"""What every command line of the project shares: one-line errors, exit codes, JSON results."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image

from wesam.errors import InputError

LOGGED = 30.0
"""Seconds between two lines of progress in a log."""

DOMAIN_HELP = (
    "a name (wesam domains lists them), or a folder or fsspec address: COCO listings, or images with label images;"
    " cells@70/10/20 cuts it into train, val and test, cells+fog:5 corrupts it"
)
PROMPT_HELP = (
    "kind of weak label: box, tight-box (a box that holds the whole object: masks are cut to it), point (5 clicks on"
    " the object, 5 beside it; point1 to point10: so many), coarse (a polygon as a mask), coarse-box; to train without"
    " labels: grid (clicks that the model itself is sure of)"
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit with code 2, and that takes ``--box -5,-5,20,20``.

    What is empty, as a variable of the shell that is not set, is refused: as a path it would be the current folder.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._negative_number_matcher = re.compile(r"-[\d.][\d.,eE+-]*$")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base has it."""
        words = list(sys.argv[1:] if args is None else args)
        for n, word in enumerate(words):
            if not word or re.fullmatch(r"--[\w-]+=", word):
                options = [w.rstrip("=") for w in words[: n + 1] if w.startswith("--")]
                told = options[-1] if options else "the command"
                self.error(f"{told} is given nothing: is a variable of the shell not set?")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints the message and where to find help, and exits."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


@contextmanager
def stoppable(*numbers: signal.Signals) -> Iterator[None]:
    """These signals are as good as Ctrl-C until the end of the block; only the main thread can say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.default_int_handler) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def guarded(run: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code: 2 for bad input, a line on stderr for each fault, 130 for Ctrl-C and
    SIGTERM.

    What stdout cannot encode, as in the name of a file that is not UTF-8, is escaped there, as it is on stderr.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with stoppable(signal.SIGTERM):  # as of a job that has had its time
            code = run() or 0
        sys.stdout.flush()
    except InputError as e:
        print("\n".join(f"error: {line}" for line in str(e).splitlines()), file=sys.stderr)
        return 2
    except (FloatingPointError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        if e.filename is None:
            raise
        print(f"error: cannot read or write {str(e.filename)[:200]}: {e.strerror}", file=sys.stderr)
        return 2
    return code


class Words(argparse.Action):
    """Words with spaces or commas between them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """As the base has it."""
        words = [word for value in values for word in value.split(",") if word]
        if not words:
            parser.error(f"{option_string} is given nothing")
        setattr(namespace, self.dest, words)


def picture_file(text: str) -> Path:
    """A picture that is going to be written: a format that there is, in a folder that is there."""
    if Image.registered_extensions().get(Path(text).suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"cannot write {text}: its ending is no picture's, give a .png")
    return json_file(text)


def json_file(text: str) -> Path:
    """What ``--json`` is given: a file in a folder that is there, or a result would be lost after hours."""
    path = Path(text)
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder, or in one that is not there")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"cannot write {text}: permission denied")
    except OSError as e:
        raise argparse.ArgumentTypeError(f"cannot write {text[:200]}: {e.strerror}") from None
    return path


def spare_files(out: Path, *read: Path) -> None:
    """Raises InputError if a file to be written is one of those that are read."""
    for file in read:
        with suppress(OSError):  # one of them is not there
            if out.samefile(file):
                raise InputError(f"{out} is read, and would be overwritten: give another file")


def write_json(path: Path | None, result: Any) -> None:
    """Writes a result where ``--json`` says, if it says."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as e:
        raise InputError(f"cannot write {path}: {e.strerror}") from None


def program(name: str) -> str:
    """How to call, from this folder, a program that was installed beside this Python: by name if the shell finds it."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) == str(path) or not path.exists():
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns under their names; floats with three decimals."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else "-" if v is None else str(v) for v in r.values()] for r in rows]
    cells.insert(0, list(rows[0]))
    widths = [max(len(c[i]) for c in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(v.ljust(w) for v, w in zip(c, widths, strict=True)).rstrip() for c in cells)


def line(text: str) -> None:
    """A line that the next one overwrites; only where a person looks on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def progress(what: str) -> Callable[[int, int], None]:
    """Such a line that counts; it goes when all is done. Where nobody looks on, a line every half minute."""
    told = time.monotonic()

    def watch(done: int, total: int) -> None:
        nonlocal told
        line(f"{what} {done}/{total}" if done < total else "")
        if not sys.stderr.isatty() and time.monotonic() - told > LOGGED:
            print(f"{what} {done}/{total}", file=sys.stderr, flush=True)
            told = time.monotonic()

    return watch
