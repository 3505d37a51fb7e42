"""The best adapter of each domain: MLflow's registered model ``wesam-<domain>``, alias ``champion``."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tuning import DEFAULT_URI, URI_VARIABLE
from tuning.card import About, card, judged_by, score, summary
from tuning.plan import WORD, WORDS, checked_name, reason_of
from tuning.scratch import scratch
from tuning.tracking import PARENT, Tracker, begun, pages, sqlite_file
from wesam import AdaptedSam, load_sam
from wesam.adapters import ABOUT, CONFIG_FILE, WEIGHTS_FILE, made_for
from wesam.errors import InputError, unknown
from wesam.sam.checkpoints import home

PREFIX, ALIAS = "wesam-", "champion"
ADAPTER, MODEL = "adapter", "model"
"""Artifacts of a trial's run: its adapter, and what MLflow serves of it once it is registered."""

CODE = Path(__file__).with_name("model.py")
"""What MLflow runs of a registered version; not imported here, since all of MLflow comes with it."""

CARD, SETTINGS = ABOUT
"""Fetched beside an adapter: its card, and its hyperparameters as ``wesam adapt --config`` reads them."""

COMPARED = ("data", "prompt", "val_prompt", "weights", "crop", "test_instances", "labels")
"""Tags in which two versions must be the same for their scores to say anything about each other; instead of weights,
where a version is older than that tag, the model's name."""

NEEDED = (
    "wesam", "mlflow", "torch", "torchvision", "segment-anything", "peft", "timm", "safetensors", "pycocotools",
    "opencv-python-headless", "numpy", "pillow", "pydantic",
)  # fmt: skip
"""Packages without which a registered version does not run."""


@dataclass(frozen=True)
class Entry:
    """A domain's champion."""

    domain: str
    version: int
    run_id: str
    tags: dict[str, str]
    """study, trial, model, prompt, data (digest), crop, score: the name of the one it was chosen by on val; val_miou,
    test_miou (a mean over seeds), test_miou_sd, direct_test_miou, ..., or the same of another score; gap_closed."""

    def number(self, name: str) -> float | None:
        """A tag that is a number; None where it is not known."""
        return _number(self.tags.get(name))

    @property
    def test(self) -> tuple[str, float | None, float | None]:
        """The name of the score on test, its mean over seeds and its standard deviation over them."""
        name = judged_by(self.tags)
        return name, self.number(f"test_{name}"), self.number(f"test_{name}_sd")


def promote(tracker: Tracker, domain: str, run_id: str, tags: Mapping[str, str]) -> tuple[int, str]:
    """Registers the adapter of a trial's run; makes it champion if it beats the present one by more than chance.

    It does if its mean score on test is above the champion's by more than the standard deviation over seeds of either.
    Scores on other data, with other prompts or of another model say nothing about each other: such a champion is always
    replaced. A run that is registered already stays as it is. Returns the version and, in words, what became of it.
    """
    client, name = tracker.client, PREFIX + domain
    known = version = _version_of(tracker, name, run_id)
    if version is None:
        about = tracker.later(lambda: _about(tracker, domain, run_id, tags)).result()
        told, short = card(about), summary(about)
        version = tracker.later(lambda: _register(tracker, domain, run_id, tags, told, short)).result()
    new = Entry(domain, version, run_id, dict(tags))
    before = champion(tracker, domain)  # after the upload: another study may have concluded meanwhile
    if before and before.run_id == run_id:
        return version, f"still champion, as version {version}"
    if before and known and known < before.version:  # else its promotion may have been interrupted
        return version, f"registered before, as version {version}; champion is version {before.version}"
    changed = _changed(before, new) if before else []
    if before and not changed and not _better(new, before):
        kept, this = (score(*e.test[1:]) for e in (before, new))
        return version, (
            f"registered without the alias: champion stays version {before.version} ({WORDS[new.test[0]]} on test "
            f"{kept}, this one {this}: not better by more than the spread over seeds)"
        )
    tracker.later(lambda: client.set_registered_model_alias(name, ALIAS, str(version))).result()
    if before is None:
        return version, "registered as champion"
    why = f"its {' and '.join(changed)} differed" if changed else f"{score(*before.test[1:])} on test"
    return version, f"registered as champion in place of version {before.version} ({why})"


def champion(tracker: Tracker, domain: str) -> Entry | None:
    """The domain's champion, if there is one; raises InputError for what is no domain's name."""
    checked_name(domain, "domain")
    try:
        found = tracker.ask(lambda: tracker.client.get_model_version_by_alias(PREFIX + domain, ALIAS))
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return _entry(found)


def champions(tracker: Tracker) -> list[Entry]:
    """All champions, by domain."""
    models = pages(partial(tracker.client.search_registered_models, f"name LIKE '{PREFIX}%'"))
    found = [m.name.removeprefix(PREFIX) for m in models if ALIAS in m.aliases]
    names = [n for n in found if re.fullmatch(WORD, n)]  # others are no domain's
    return [e for n in sorted(names) if (e := champion(tracker, n))]


def fetch(tracker: Tracker, domain: str, out: Path | None) -> tuple[Entry, dict[str, Any]]:
    """A domain's champion and its configuration; if a folder is given, its adapter, configuration and card go there.

    A champion that an older version has registered has no card.

    Raises InputError if there is none, and for a folder that holds something else than an adapter fetched before.
    """
    entry = champion(tracker, domain)
    if entry is None:
        known = [e.domain for e in champions(tracker)]
        if not known:
            raise InputError(f"no champion at {tracker.uri}: first run a study, python -m tuning run --domain {domain}")
        raise unknown("domain", domain, known)
    config = {k: _value(v) for k, v in tracker.run(entry.run_id).data.params.items()}
    if out is not None:
        try:
            _check_free(out)
            out.mkdir(parents=True, exist_ok=True)
            (out / CARD).unlink(missing_ok=True)  # of what was fetched before
            for name, contents in _files(tracker, entry, config).items():
                (out / name).write_bytes(contents)
        except OSError as e:
            raise InputError(f"cannot write to --out {out}: {e.strerror}") from None
    return entry, config


def best_folder(domain: str, tracking_uri: str | None = None) -> Path:
    """A folder on this machine with the champion's adapter, kept in ``$WESAM_HOME`` under its version.

    Raises InputError if there is no champion for the domain, or no way to MLflow.
    """
    with opened(tracking_uri) as tracker:
        entry, config = fetch(tracker, domain, None)
        kept = home() / "adapters" / f"{domain}-{entry.version}-{entry.run_id}"
        if not kept.is_dir():
            files = _files(tracker, entry, config)
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                new = Path(tempfile.mkdtemp(dir=kept.parent, prefix=f".{kept.name}-"))
                new.chmod(kept.parent.stat().st_mode & 0o777)  # what is made here is for its owner's eyes alone
                for name, contents in files.items():
                    (new / name).write_bytes(contents)
                try:
                    new.rename(kept)
                except OSError:
                    shutil.rmtree(new)
                    if not kept.is_dir():  # another process has not been quicker
                        raise
            except OSError as e:
                raise InputError(f"cannot keep an adapter in {kept.parent}: {e.strerror}") from None
    return kept


def best_adapter(domain: str, tracking_uri: str | None = None, model: str | None = None) -> AdaptedSam:
    """The champion of a domain, ready for :func:`wesam.predict`, on the CPU.

    tracking_uri: MLflow's, else ``$MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db``. model: a file with the weights
    that the adapter is for, where the model is not one that has a name. Raises InputError if there is no champion, and
    if the weights are others.
    """
    folder = best_folder(domain, tracking_uri)
    return AdaptedSam.load(load_sam(model or made_for(folder)), folder)


@contextlib.contextmanager
def opened(tracking_uri: str | None = None) -> Iterator[Tracker]:
    """MLflow, for reading; what it refuses becomes an InputError, and no database is created."""
    uri = tracking_uri or os.environ.get(URI_VARIABLE) or DEFAULT_URI
    file = sqlite_file(uri)
    if file and not file.is_file():
        raise InputError(f"no champions: there is no MLflow database {file}; set {URI_VARIABLE}, or run a study first")
    tracker = Tracker(uri)
    try:
        yield tracker
    except MlflowException as e:
        raise InputError(f"MLflow at {tracker.uri}: {reason_of(e)}") from None
    finally:
        tracker.close()


def _better(new: Entry, old: Entry) -> bool:
    (_, mean, spread), (_, kept, kept_spread) = new.test, old.test
    return mean is not None and kept is not None and mean > kept + max(spread or 0.0, kept_spread or 0.0)


def _changed(old: Entry, new: Entry) -> list[str]:
    """In what two versions differ so that their scores cannot be compared."""
    before, now = ({"test_instances": "0", "labels": "", **e.tags} for e in (old, new))
    weights = "weights" if "weights" in before and "weights" in now else "model"
    changed = [k for k in (weights if k == "weights" else k for k in COMPARED) if before.get(k) != now.get(k)]
    return changed if old.test[0] == new.test[0] and old.test[1] is not None else [*changed, "score"]


def _version_of(tracker: Tracker, name: str, run_id: str) -> int | None:
    """The version that a run has been registered as, if it has."""
    of_run = f"name = '{name}' and run_id = '{run_id}'"
    found = tracker.ask(lambda: tracker.client.search_model_versions(of_run))
    return min((int(v.version) for v in found), default=None)


def place_of(artifact: str, domain: str, joint: str | None) -> str:
    """Where a run has it; that of a joint study has one for each domain."""
    return f"{artifact}/{domain}" if joint else artifact


def _register(tracker: Tracker, domain: str, run_id: str, tags: Mapping[str, str], told: str, short: str) -> int:
    """told, short: the card, and its summary."""
    client, name, place = tracker.client, PREFIX + domain, place_of(MODEL, domain, tags.get("joint"))
    with scratch() as folder:
        out = folder / MODEL
        (adapter := folder / ADAPTER).mkdir()
        for file, contents in _adapter(tracker, run_id, place_of(ADAPTER, domain, tags.get("joint"))).items():
            (adapter / file).write_bytes(contents)
        package(adapter, out)
        (out / CARD).write_text(told)
        client.log_artifacts(run_id, str(out), place)
    try:
        client.create_registered_model(name, description=f"adapters of a SAM for the domain {domain}")
    except MlflowException as e:
        if e.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if made := _version_of(tracker, name, run_id):
        return made  # at an earlier attempt, whose answer was lost with the server
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    return int(client.create_model_version(name, source, run_id, tags=dict(tags), description=short).version)


def package(adapter: Path, out: Path) -> None:
    """Writes what MLflow loads and serves: CODE with an adapter's folder, no pickle, and no path of this machine."""
    import mlflow.pyfunc
    from mlflow.models import Model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow asks for an example, which would have to hold an image
        mlflow.pyfunc.save_model(
            str(out),
            python_model=str(CODE),
            artifacts={ADAPTER: str(adapter)},
            model_config={"model": None, "device": None},
            pip_requirements=[f"{p}=={installed(p).partition('+')[0]}" for p in NEEDED],
        )
    about = Model.load(str(out))
    flavor = about.flavors[mlflow.pyfunc.FLAVOR_NAME]
    flavor["model_code_path"] = CODE.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    about.save(str(out / "MLmodel"))


def _about(tracker: Tracker, domain: str, run_id: str, tags: Mapping[str, str]) -> About:
    """What the card of a run's adapter says; the references that are not among the tags are in the domain's run."""
    run = tracker.run(run_id)
    parent = run.data.tags.get(PARENT)
    scores: dict[str, float] = {}
    trials = 0
    if parent:
        scores = dict(tracker.run(parent).data.metrics)
        trials = len(begun(tracker.each("trial", parent=parent)))
    scores |= {k: n for k, v in tags.items() if (n := _number(v)) is not None}
    base = json.loads(_adapter(tracker, run_id, place_of(ADAPTER, domain, tags.get("joint")))[CONFIG_FILE])[
        "base_model_name_or_path"
    ]
    step = run.data.metrics.get("best_step")
    return About(
        domain=domain, run_id=run_id, tags=dict(tags), scores=scores, config=dict(run.data.params), base=base,
        trials=trials, step=None if step is None else int(step),
    )  # fmt: skip


def _files(tracker: Tracker, entry: Entry, config: Mapping[str, Any]) -> dict[str, bytes]:
    """What is fetched of a champion."""
    found = _adapter(tracker, entry.run_id, place_of(ADAPTER, entry.domain, entry.tags.get("joint")))
    place = place_of(MODEL, entry.domain, entry.tags.get("joint"))
    settings = json.dumps(config, indent=2, sort_keys=True) + "\n"
    has_card = f"{place}/{CARD}" in (f.path for f in tracker.client.list_artifacts(entry.run_id, place))
    cards = {CARD: tracker.files(entry.run_id, place)[CARD]} if has_card else {}
    return {**found, SETTINGS: settings.encode(), **cards}


def _adapter(tracker: Tracker, run_id: str, place: str) -> dict[str, bytes]:
    """The two files of an adapter, and nothing else that lies there; raises InputError if they are not, or are none."""
    found = tracker.files(run_id, place)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: found[name] for name in (CONFIG_FILE, WEIGHTS_FILE) if name in found}
        for name, contents in files.items():
            (Path(folder) / name).write_bytes(contents)
        try:
            made_for(Path(folder))
        except InputError as e:
            raise InputError(f"in run {run_id}: {str(e).replace(folder, place)}") from None
    if len(files) != 2:
        raise InputError(f"in run {run_id}: no adapter in {place}: {WEIGHTS_FILE} is missing")
    return files


def _check_free(out: Path) -> None:
    """Raises InputError if writing an adapter into this folder would mix it with, or overwrite, something else."""
    held = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    others = [n for n in held if n not in (CONFIG_FILE, WEIGHTS_FILE, SETTINGS, CARD)]
    if others or (held and CONFIG_FILE not in held):
        raise InputError(f"--out {out} holds something else ({(others or held)[0]}): give a new or an empty folder")


def _value(text: str) -> Any:
    """A hyperparameter as MLflow has it, as a number or a truth value if it is one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _entry(found: ModelVersion) -> Entry:
    run_id = checked_name(str(found.run_id), f"{found.name} is of the run")
    return Entry(found.name.removeprefix(PREFIX), int(found.version), run_id, dict(found.tags))
