"""The best adapter of each domain: MLflow's registered model ``wesam-<domain>``, alias ``champion``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tuning.tracking import Tracker
from wesam.errors import InputError, unknown

PREFIX, ALIAS = "wesam-", "champion"


@dataclass(frozen=True)
class Entry:
    """A domain's champion."""

    domain: str
    version: int
    run_id: str
    tags: dict[str, str]
    """study, model, prompt, data (digest), val_miou, test_miou, direct_test_miou, domain_given; where no masks are
    known, score is ``label_free`` and those are val_label_free, ..."""


def promote(
    tracker: Tracker, domain: str, run_id: str, tags: Mapping[str, str], folder: str = "adapter"
) -> tuple[int, str]:
    """Registers the adapter of a trial's run; makes it champion if its score on val beats the present champion's.

    Scores on other data say nothing about each other, so a champion found on other data is always replaced.
    Returns the version and, in words, what became of it.
    """
    client, name = tracker.client, PREFIX + domain

    def register() -> int:
        try:
            client.create_registered_model(name, description=f"adapters of a SAM for the domain {domain}")
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        return int(client.create_model_version(name, source, run_id, tags=dict(tags)).version)

    before = champion(tracker, domain)
    if before and before.run_id == run_id:
        return before.version, f"still champion, as version {before.version}"
    version = tracker.later(register).result()
    score = f"val_{tags.get('score', 'miou')}"
    val = float(tags[score])
    changed = [k for k in ("data", "prompt", "model") if before and before.tags.get(k) != tags.get(k)]
    if before and not changed and float(before.tags[score]) >= val:
        kept = float(before.tags[score])
        return version, f"registered; champion stays version {before.version} (val {kept:.3f}, this one {val:.3f})"
    tracker.later(lambda: client.set_registered_model_alias(name, ALIAS, str(version))).result()
    if before is None:
        return version, "registered as champion"
    why = f"its {' and '.join(changed)} differed" if changed else f"val {before.tags[score]}"
    return version, f"registered as champion in place of version {before.version} ({why})"


def champion(tracker: Tracker, domain: str) -> Entry | None:
    """The domain's champion, if there is one."""
    try:
        found = tracker.client.get_model_version_by_alias(PREFIX + domain, ALIAS)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return _entry(found)


def champions(tracker: Tracker) -> list[Entry]:
    """All champions, by domain."""
    names: list[str] = []
    token = None
    while True:
        page = tracker.client.search_registered_models(f"name LIKE '{PREFIX}%'", page_token=token)
        names += [m.name.removeprefix(PREFIX) for m in page if ALIAS in m.aliases]
        token = page.token
        if not token:
            break
    return [e for n in sorted(names) if (e := champion(tracker, n))]


def fetch(tracker: Tracker, domain: str, out: Path | None) -> tuple[Entry, dict[str, Any]]:
    """A domain's champion and its configuration; its adapter is written to the folder, if one is given."""
    entry = champion(tracker, domain)
    if entry is None:
        known = [e.domain for e in champions(tracker)]
        if not known:
            raise InputError(f"no champion at {tracker.uri}: first run a study, python -m tuning run --domain {domain}")
        raise unknown("domain", domain, known)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, contents in tracker.files(entry.run_id, "adapter").items():
                (out / name).write_bytes(contents)
        except OSError as e:
            raise InputError(f"cannot write to --out {out}: {e.strerror}") from None
    return entry, dict(tracker.client.get_run(entry.run_id).data.params)


def _entry(found: ModelVersion) -> Entry:
    return Entry(found.name.removeprefix(PREFIX), int(found.version), str(found.run_id), dict(found.tags))
