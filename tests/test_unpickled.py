"""Nothing is unpickled: no module of the project reads what can carry code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "skops"}
ALLOWED = "pickle.UnpicklingError"
"""What torch raises for a file that carries code."""


def faults(text: str) -> Iterator[str]:
    """What of a module's text reads, or may read, a pickle."""
    for node in ast.walk(ast.parse(text)):
        found: list[str] = []
        if isinstance(node, ast.ImportFrom):
            found = [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Import):
            found = [a.name for a in node.names if a.name.split(".")[0] in MODULES and (a.name != "pickle" or a.asname)]
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            found = [name] if name.startswith("pickle.") and name != ALLOWED else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = called != "torch.load" or options.get("weights_only") == "True"
            safe &= options.get("weights_only") != "False" and options.get("allow_pickle", "False") == "False"
            safe &= called not in ("eval", "exec")
            safe &= called != "yaml.load" or ast.unparse(node.args[1]) == "_Loader"
            found = [] if safe else [called]
        yield from (f"{name}, line {getattr(node, 'lineno', '?')}" for name in found)


def test_no_module_reads_a_pickle() -> None:
    files = [f for package in ("wesam", "tuning", "cluster") for f in (ROOT / package).rglob("*.py")]
    assert len(files) > 50
    assert [f"{f.relative_to(ROOT)}: {fault}" for f in files for fault in faults(f.read_text())] == []


def test_one_that_does_is_seen() -> None:
    for text in (
        "pickle.load(f)", "import pickle as p", "from pickle import loads", "import joblib", "import cloudpickle.x",
        "torch.load(path)", "torch.load(path, weights_only=False)", "numpy.load(path, allow_pickle=True)", "eval(text)",
        "yaml.load(text, yaml.Loader)",
    ):  # fmt: skip
        assert list(faults(text)), text
    assert not list(
        faults("import pickle\ntry: torch.load(p, weights_only=True)\nexcept pickle.UnpicklingError: m.eval()")
    )
