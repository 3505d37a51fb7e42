"""Weights files: where they are, how they are fetched, and how they are read without running what they carry."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import pickle
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Collection, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from wesam.errors import InputError, plainly, reason

BLOCK = 2**20
ATTEMPTS = 5
"""Times that a transfer is taken up again before it is given up."""

NUMBERS = {"F32", "F16", "BF16", "I64"}
"""What numbers a file of :func:`read_tensors` may hold, as safetensors names them."""

WIDEST = 8
"""Bytes of the widest of them."""

HEADER_BYTES = 2**20
"""More than the names and shapes of an adapter or a checkpoint take."""


def home() -> Path:
    """The folder of the weights: ``$WESAM_HOME``, else ``wesam`` in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("WESAM_HOME") or cache / "wesam")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU, in single precision; raises InputError for a file that holds anything else."""
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of an odd pickle protocol, which junk seems to have
                state = torch.load(path, map_location="cpu", weights_only=True)
            while isinstance(state, dict) and len(inner := [k for k in ("model", "state_dict") if k in state]) == 1:
                state = state[inner[0]]
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot read weights from {path}: {plainly(e)}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is no checkpoint of plain tensors: it is damaged, or carries code; not read"
        ) from None
    except Exception as e:  # whatever torch's unpickler makes of the bytes
        raise InputError(f"{path} is no file of weights (.pth, .safetensors), or damaged: {reason(e)}") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds something else than tensors by name")
    return {str(k).removeprefix("module."): v.float() for k, v in state.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file that can be read says of itself; nothing for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def own_file(path: Path) -> Path:
    """The file, if it is there and lies in its folder; raises InputError if it is a link that leads out of it."""
    if not path.is_file():
        raise InputError(f"{path.name} is missing")
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(f"{path.name} is a link that leads out of the folder: not read")
    return path


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; who may read other new files here may read it, though the package asks for less."""
    there = path.exists()
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(about) if about else None)
    except BaseException:
        if not there:
            path.unlink()
        raise
    path.chmod(mode)


def read_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], optional: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file that is to have just these, on the CPU, and what it says of itself.

    optional: those of them that may be absent. Raises InputError for a file that holds anything else, before any of it
    is read: its size and its header are looked at first.
    """
    own_file(path)
    size, most = path.stat().st_size, HEADER_BYTES + WIDEST * sum(math.prod(s) for s in shapes.values())
    if size > most:
        raise InputError(f"{path.name} has {size} bytes, what belongs there at most {most}: not read")
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            given = {name: tuple(part.get_shape()) for name, part in parts.items()}
            wrong = [n for n, s in given.items() if n not in shapes or s != tuple(shapes[n])]
            if wrong or (wrong := [n for n in shapes if n not in given and n not in optional]):
                raise InputError(
                    f"{path.name}: names or shapes differ from what belongs there, as of {wrong[0][:100]!r}"
                )
            if kinds := {part.get_dtype() for part in parts.values()} - NUMBERS:
                raise InputError(
                    f"{path.name} holds {', '.join(sorted(kinds))}, not one of {', '.join(sorted(NUMBERS))}"
                )
            return {name: file.get_tensor(name) for name in given}, dict(file.metadata() or {})
    except (OSError, SafetensorError, RuntimeError) as e:
        raise InputError(f"{path.name} is no safetensors file, or damaged: {reason(e)}") from None


def said_of(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself, from its header alone; nothing if it is none."""
    with own_file(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            head = json.loads(file.read(size)) if size <= HEADER_BYTES else {}
        except (ValueError, RecursionError):
            return {}
    about = head.get("__metadata__", {}) if isinstance(head, dict) else {}
    return {k: str(v) for k, v in about.items()} if isinstance(about, dict) else {}


def fetch(url: str, path: Path, digest: str) -> None:
    """Downloads to ``path``, with progress on stderr, going on from what an earlier try left in ``path``.part.

    The file is moved into place only when its SHA-256 is ``digest``; raises InputError if it is not, if the server
    cannot be reached, or if the folder cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = part.open("ab")
    except OSError as e:
        raise InputError(f"cannot write {part}: {e.strerror}; $WESAM_HOME says where weights are kept") from None
    with opened as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is fetching {path.name}: wait for it") from None
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _transfer(url, f, path.name)
                break
            except urllib.error.HTTPError as e:
                raise InputError(f"{url} answers {e.code} {e.reason}; {_elsewhere(path)}") from None
            except (OSError, HTTPException) as e:
                why = getattr(e, "reason", e)
                if f.tell() == 0 or attempt == ATTEMPTS:
                    kept = f"; {f.tell() / 1e6:.0f} MB are kept, the same command goes on" if f.tell() else ""
                    raise InputError(f"cannot fetch {url}: {why}{kept}; {_elsewhere(path)}") from None
            finally:
                if f.tell() == 0:
                    part.unlink()
        f.flush()
        if (found := sha256(part)) != digest:
            part.unlink()
            raise InputError(f"what {url} sent has the SHA-256 {found}, not {digest}: it was deleted; try again")
        part.replace(path)


def _elsewhere(path: Path) -> str:
    return f"or download it elsewhere and put it here: {path}"


def _transfer(url: str, file: BinaryIO, name: str) -> None:
    """Appends to the file what the server has beyond its end; starts again where the server cannot do that."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={file.tell()}-"} if file.tell() else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416 and file.tell():  # nothing lies beyond the end: all is here
            return
        raise
    with answer:
        if answer.status != 206:
            file.truncate(0)
            file.seek(0)
        length = answer.headers.get("Content-Length")
        total = file.tell() + int(length) if length else None
        bar = tqdm(
            desc=name, total=total, initial=file.tell(), unit="B", unit_scale=True, unit_divisor=1000,
            file=sys.stderr, mininterval=0.5,
        )  # fmt: skip
        with bar:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and file.tell() < total:
            raise OSError(f"the connection broke off after {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB")
