"""Adapters by the name of their domain: from whom, and what is said where there are none."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from wesam import InputError
from wesam.found import GROUP, adapter_folder


def known(domain: str) -> Path:
    """A provider that has an adapter for one domain."""
    if domain != "nuclei":
        raise InputError(f"no champion of {domain}")
    return Path("/kept") / domain


PROVIDER = EntryPoint("test", f"{__name__}:known", GROUP)
BROKEN = EntryPoint("broken", "no_such_module:known", GROUP)


def test_a_domain_is_asked_for_where_there_is_no_such_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert adapter_folder("nuclei", [BROKEN, PROVIDER]) == Path("/kept/nuclei")
    (tmp_path / "nuclei").mkdir()
    assert adapter_folder("nuclei", [PROVIDER]) == Path("/kept/nuclei"), "a folder of images may have the domain's name"
    (tmp_path / "nuclei" / "adapter_config.json").touch()
    assert adapter_folder("nuclei", [PROVIDER]) == Path("nuclei")
    assert adapter_folder("./birds", [PROVIDER]) == Path("birds")
    assert adapter_folder("no/where", [PROVIDER]) == Path("no/where")


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="there is no folder birds, and no champion of birds"):
        adapter_folder("birds", [PROVIDER])
    with pytest.raises(InputError, match="there is no folder birds, and nothing that knows adapters by their domain"):
        adapter_folder("birds", [])
    with pytest.raises(InputError, match="no_such_module:known cannot be loaded"):
        adapter_folder("birds", [BROKEN])
    (tmp_path / "birds").mkdir()
    with pytest.raises(InputError, match="no adapter in birds: adapter_config"):
        adapter_folder("birds", [PROVIDER])
