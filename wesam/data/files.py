"""A domain's files, in a folder here or at any address that fsspec knows."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import fsspec

from wesam.errors import InputError, reason
from wesam.sam.checkpoints import home

MOST_FILES = 2_000_000
"""A folder with more is refused: it was hardly meant."""

VERSIONS = (
    "ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime", "modificationTime",
    "created", "CRC",
)  # fmt: skip
"""What changes with a file's content, as storages call it in their listings: many tell one or two of these."""

CACHE_GB = 20.0
"""What is kept of distant files on a machine, in 10^9 bytes; ``$WESAM_CACHE_GB`` says otherwise."""


class Folder:
    """The files under a folder or an fsspec address (``s3://bucket/cells``), by their names relative to it, with "/".

    Distant files are kept in ``cache`` in the folder of the weights; what was used longest ago goes first. Nothing is
    ever written to the folder itself.
    """

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/") or "/"
        self.name = PurePosixPath(self.place).name if is_address(place) else Path(place).resolve().name
        """What the folder is called."""
        self._here = None if is_address(place) else Path(place)

    @property
    def distant(self) -> bool:
        """Whether its files must be fetched."""
        return self._here is None

    def __contains__(self, name: str) -> bool:
        try:
            return name in self.sizes if self._here is None else (self._here / name).is_file()
        except OSError:  # a name that is too long, say
            return False

    def has(self, name: str) -> bool:
        """Whether there is a file or a folder of this name."""
        try:
            return name in self.folders or name in self.sizes if self._here is None else (self._here / name).exists()
        except OSError:  # it lies in a folder that nobody may look into
            return False

    def path(self, name: str) -> str:
        """How a message calls this file; what an address is chained to stays behind the name."""
        protocol, slashes, path = self.place.partition("://")
        path, chain, rest = path.partition("::")
        if not chain:
            return f"{self.place}/{name}"
        return f"{protocol}{slashes}{path.rstrip('/')}{'/' if path else ''}{name}{chain}{rest}"

    def local(self, name: str) -> Path:
        """The file, here; raises InputError if it cannot be had."""
        return self._here / name if self._here is not None else _CACHE.get(self, name)

    def size(self, name: str) -> int:
        """Its size in bytes."""
        return self.sizes[name] if self._here is None else (self._here / name).stat().st_size

    def stamp(self, name: str) -> str:
        """What changes when the file does: its size in bytes and when it was last written or, of a distant file, what
        of :data:`VERSIONS` the listing of its folder tells; empty for one that is not listed.
        """
        if self._here is None:
            return self._listed.get(name, (0, ""))[1]
        stat = (self._here / name).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    @cached_property
    def names(self) -> list[str]:
        """All files, sorted; none whose name or folder begins with a dot."""
        if self._here is None:
            return sorted(self.sizes)
        found: list[str] = []
        for parent, folders, files in os.walk(self._here, followlinks=True):
            visible = (f for f in folders if not f.startswith(".") and f != "__MACOSX")
            folders[:] = [f for f in visible if not self._leads_back(parent, f)]
            base = Path(parent).relative_to(self._here).as_posix()
            found += [f if base == "." else f"{base}/{f}" for f in files if not f.startswith(".")]
            if len(found) > MOST_FILES:
                raise InputError(f"{self.place} holds more than {MOST_FILES} files: name the folder of one domain")
        return sorted(found)

    def _leads_back(self, parent: str, folder: str) -> bool:
        """Whether it is a link to one of the folders that it lies in, or to what one of them lies in."""
        link = Path(parent, folder)
        if not link.is_symlink():
            return False
        assert self._here is not None
        real, above = os.path.realpath(link), [link.parent]
        while above[-1] != self._here:
            above.append(above[-1].parent)
        return any(os.path.commonpath((real, os.path.realpath(a))) == real for a in above)

    @property
    def places(self) -> set[Path]:
        """Where its files really are, those too of folders that are links; of one on this machine."""
        assert self._here is not None
        return {(self._here / folder).resolve() for folder in {PurePosixPath(n).parent for n in self.names}}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """All files of a distant folder with their sizes in bytes."""
        return {name: size for name, (size, _) in self._listed.items()}

    @cached_property
    def _listed(self) -> dict[str, tuple[int, str]]:
        """The size in bytes and the stamp of each file of a distant folder."""
        system, base = self._reached
        try:
            found = system.find(base, detail=True)
        except Exception as e:  # each kind of storage has errors of its own
            raise InputError(f"cannot read {self.place}: {reason(e)}") from None
        start = len(base.rstrip("/"))
        files = {
            str(k)[start:].lstrip("/"): (
                int(v.get("size") or 0), " ".join(str(v[t]) for t in ("size", *VERSIONS) if t in v)
            )
            for k, v in found.items()
        }  # fmt: skip
        return {k: v for k, v in files.items() if not any(p.startswith(".") for p in k.split("/"))}

    @cached_property
    def folders(self) -> set[str]:
        """All folders in a distant one."""
        return {str(f) for name in self.sizes for f in PurePosixPath(name).parents} - {"."}

    def within(self, depth: int) -> Iterator[Folder]:
        """This folder, and those in it so many levels deep, the outer ones first."""
        yield self
        if self._here is None:
            for name in sorted(self.folders, key=lambda n: (n.count("/"), n)):
                if name.count("/") < depth:
                    yield Folder(self.path(name))
            return
        level = [self._here]
        for _ in range(depth):
            level = sorted(Path(e.path) for f in level for e in _entries(f) if e.is_dir() and e.name[0] != ".")
            yield from (Folder(str(f)) for f in level)

    @cached_property
    def _reached(self) -> tuple[Any, str]:
        """The fsspec file system of a distant folder, and what it is called there."""
        try:
            system, base = fsspec.core.url_to_fs(self.place)
        except Exception as e:  # a protocol that is unknown or whose package is missing
            raise InputError(f"cannot read {self.place}: {reason(e)}") from None
        return system, str(base)

    def fetch(self, name: str, path: Path) -> None:
        """Copies a distant file to this path."""
        system, base = self._reached
        try:
            system.get_file(f"{base.rstrip('/')}/{name}", str(path))
        except Exception as e:
            raise InputError(f"cannot fetch {self.path(name)}: {reason(e)}") from None


def is_address(place: str) -> bool:
    """Whether this names a distant folder rather than one of this machine."""
    return "://" in place


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:  # not ours to read
        return []


def leads_out(name: str) -> bool:
    """Whether a relative name of a file is none, or leads out of its folder."""
    return any(p(name).is_absolute() or ".." in p(name).parts for p in (PurePosixPath, PureWindowsPath))


class _Cache:
    """Copies of distant files, moved into place whole, at most so many bytes of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = 0

    def get(self, folder: Folder, name: str) -> Path:
        said = f"{folder.path(name)} {folder.stamp(name)}"
        key = hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()
        path = home() / "cache" / key[:2] / (key + PurePosixPath(name).suffix)
        if path.is_file():
            os.utime(path)
            return path
        new = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder.fetch(name, new)
            new.replace(path)
        except OSError as e:
            raise InputError(f"cannot keep {folder.path(name)} in {home() / 'cache'}: {e.strerror}") from None
        finally:
            new.unlink(missing_ok=True)
        self._make_room(path)
        return path

    def _make_room(self, newest: Path) -> None:
        """Looks at the whole cache whenever a fiftieth of its limit has come in."""
        limit = _limit()
        with self._lock:
            self._since += newest.stat().st_size
            if self._since < limit / 50:
                return
            self._since = 0
            files = []
            for path in (home() / "cache").glob("*/*"):
                try:
                    stat = path.stat()
                except OSError:  # another process has taken it away
                    continue
                files.append((stat.st_mtime_ns, stat.st_size, path))
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total <= limit * 0.96:
                    break
                if path != newest:
                    path.unlink(missing_ok=True)
                    total -= size


_CACHE = _Cache()


def _limit() -> float:
    given = os.environ.get("WESAM_CACHE_GB", "")
    try:
        limit = float(given or CACHE_GB)
    except ValueError:
        limit = -1
    if not limit > 0:
        raise InputError(f"WESAM_CACHE_GB must be a number above 0, got {given!r}")
    return limit * 1e9
