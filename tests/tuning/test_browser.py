"""What MLflow's pages show of a study, in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.tuning.conftest import served
from tuning.tracking import Tracker, trials_page
from wesam import Config

BROWSER = shutil.which("chromium") or ""
RANKS = {"nuclei 1": 4, "nuclei 2": 8}
"""Trial -> its lora.rank."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="no chromium on PATH")]


class Texts(HTMLParser):
    """Collects what stands between a page's tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.found.append(data.strip())


def shown(url: str, wanted: set[str], profile: Path) -> list[str]:
    """The texts of a page; it is opened again while it is not complete, as on a machine that is busy."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,1200", f"--user-data-dir={profile}"]
    for _ in range(3):
        command = [BROWSER, *options, "--virtual-time-budget=25000", "--dump-dom", url]
        page = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
        texts = Texts(page).found
        if wanted <= set(texts):
            break
    return texts


def test_the_trials_of_a_study_are_listed_and_compared(tracker: Tracker, tmp_path: Path) -> None:
    study = tracker.start("nuclei-box", "study", None, {})
    domain = tracker.start("nuclei", "domain", study, {})
    runs = []
    for name, rank in RANKS.items():
        run = tracker.start(name, "trial", domain, {"wesam.trial": name[-1]})
        run.log({"val_miou": 0.5}, step=0, params=Config().replace({"lora.rank": rank}).flat())
        run.log({"val_miou": 0.5 + rank / 64, "best_score": 0.5 + rank / 64, "best_step": 4}, step=4)
        run.close()
        runs.append(run)
    experiment = runs[0].info.experiment_id
    tracker.close("FINISHED")

    with served(["server", "--backend-store-uri", tracker.uri], "health", tmp_path) as address:
        compared = f"runs={quote(json.dumps([r.id for r in runs]))}&experiments={quote(json.dumps([experiment]))}"
        wanted = {*RANKS, *Config().flat(), "val_miou", "best_score", "0.563", "0.625"}
        texts = shown(f"{address}/#/compare-runs?{compared}", wanted, tmp_path / "profile")
        assert wanted <= set(texts)
        columns = [t for t in texts if t in RANKS][:2]
        rows = list(zip(texts, texts[1:], texts[2:], strict=False))
        assert ("lora.rank", *(str(RANKS[c]) for c in columns)) in rows

        wanted = {"nuclei-box", "nuclei", *RANKS}
        texts = shown(trials_page(address, experiment), wanted, tmp_path / "profile")
        assert [t for t in texts if t in RANKS] == ["nuclei 2", "nuclei 1"], "the best first"
        assert "Training runs" not in texts, "the page of experiments with language models"
        assert wanted <= set(texts)
