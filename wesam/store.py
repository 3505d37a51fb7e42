"""Tensors kept on disk under names that say all that made them; shared by every process of a machine."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

_DIGEST = 32
"""Bytes before the content of a file: its BLAKE2b digest."""


class Store:
    """A folder of small files, each moved into place whole, and checked whenever it is read.

    Two processes that make the same thing at once write the same file; one that is damaged is as good as absent. Where
    the folder cannot be written, a warning says so once and nothing is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._usable = True

    def get(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under this name, or None."""
        try:
            content = self._path(name).read_bytes()
        except OSError:
            return None
        digest, body = content[:_DIGEST], content[_DIGEST:]
        return load(body) if hashlib.blake2b(body, digest_size=_DIGEST).digest() == digest else None

    def put(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors, on the CPU, under this name."""
        if not self._usable:
            return
        body, path = save(tensors), self._path(name)
        new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(hashlib.blake2b(body, digest_size=_DIGEST).digest() + body)
            new.replace(path)
        except OSError as e:
            self._usable = False
            warnings.warn(f"nothing is kept in {self.folder}: {e.strerror}", stacklevel=2)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name
