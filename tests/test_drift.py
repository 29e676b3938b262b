"`rakuten-nb drift` on the prediction log and on catalogues, with real processes and stores."
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run

from rakuten_nb.data.profile import profile_numbers, reference_profile
from rakuten_nb.data.sample import make_sample
from rakuten_nb.evaluation.drift_tests import DriftParams, Window, confirmed, drift_report
from rakuten_nb.models.bundle import load_bundle
from rakuten_nb.store.database import Store, open_store
from rakuten_nb.store.deployments import adopt
from rakuten_nb.store.drift_reports import last_drift_reports
from rakuten_nb.store.model_copies import copy_bundle
from rakuten_nb.store.prediction_log import add_predictions

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)

class Log:
    "A store with a champion, and the environment of commands that read it."
    def __init__(self, home: Path, bundle: Path):
        self.store: Store = open_store(f"sqlite:///{home}/data/rakuten.sqlite")
        self.version = adopt(self.store, copy_bundle(bundle, home / "data/models").name, "bundle", "first").champion
        self.env = {"RAKUTEN_DATA_DIR": str(home / "data"), "RAKUTEN_BUNDLE": str(bundle)}
        self.numbers = profile_numbers(load_bundle(bundle).about["profile"])
        self.about = load_bundle(bundle).about["profile"]
        self.count = 0

    def rows(self, n: int, at: datetime, shift: float = 0.0) -> None:
        "Log predictions as in the reference; a share `shift` of them is shifted: no French words, one type."
        rng = np.random.default_rng(self.count)
        def value(name: str) -> float:
            r = self.numbers[name]
            edges = [*r["edges"], r["edges"][-1] + 1] if r["edges"] else [r["mean"][0]]
            return float(edges[rng.choice(len(r["share"]), p=np.array(r["share"]) / sum(r["share"]))])
        codes, p = list(self.about["types"]), np.array(list(self.about["types"].values()))
        confidence = [*self.about["confidence"]["edges"], 1.0]
        for _ in range(n):
            moved = rng.random() < shift
            numbers = [0.0 if moved and name == "french" else value(name) for name in self.numbers]
            code = int(codes[0] if moved else rng.choice(codes, p=p / p.sum()))
            row = {"request_id": f"r{self.count}", "product_id": f"p{self.count}", "at": at, "user": "marie",
                   "prdtypecode": code, "confidence": float(rng.choice(confidence)), "needs_review": False, "top5": [],
                   "experts": {}, "model_version": self.version, "variant": "champion", "profile": numbers}
            add_predictions(self.store, [row])
            self.count += 1

@pytest.fixture
def log(tmp_path: Path, bundle: Path) -> Iterator[Log]:
    "An empty log."
    made = Log(tmp_path, bundle)
    yield made
    made.store.close()

def drift(rakuten: Run, log: Log, *options: object) -> tuple[int, dict[str, Any], str]:
    "The exit code, the JSON and the last line of an error of `rakuten-nb drift`."
    answer = rakuten("drift", *options, "--json", "-", extra=log.env)
    lines = answer.stderr.strip().splitlines()
    return answer.returncode, json.loads(answer.stdout or "{}"), lines[-1] if lines else ""

def test_quiet_traffic_exits_with_0(log: Log, rakuten: Run) -> None:
    log.rows(400, NOW)
    code, report, _ = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    assert (code, report["drift"], report["rows"], report["model_version"]) == (0, False, 400, log.version)
    assert {c["name"] for c in report["comparisons"]} == {*log.numbers, "confidence", "predicted types"}

def test_moved_traffic_exits_with_3_and_names_what_moved(log: Log, rakuten: Run) -> None:
    log.rows(400, NOW, shift=0.6)
    code, report, line = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    moved = [c for c in report["comparisons"] if c["moved"]]
    assert code == 3 and line.startswith("error: drift: ")
    assert {"french", "predicted types"} <= {c["name"] for c in moved}
    assert all(c["effect"] >= 0.1 and c["p"] <= 0.01 and c["examples"] for c in moved)
    assert "french fell from" in next(c["words"] for c in moved if c["name"] == "french")
    (stored,) = last_drift_reports(log.store)
    assert stored.drift and stored.rows == 400 and stored.report == report

def test_too_few_predictions_exit_with_4(log: Log, rakuten: Run) -> None:
    log.rows(50, NOW)
    code, report, line = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    assert (code, report) == (4, {}) and "expected at least 200 predictions" in line and "found 50" in line

@pytest.mark.services
def test_a_window_holds_its_own_predictions_only(log: Log, rakuten: Run) -> None:
    log.rows(250, NOW - timedelta(days=3), shift=0.9)
    log.rows(250, NOW)
    assert drift(rakuten, log, "--since", "2026-11-20", "--until", "2026-11-22")[0] == 3
    assert drift(rakuten, log, "--since", "2026-11-23", "--until", "2026-11-25")[0] == 0

@pytest.mark.services
def test_a_catalogue_is_compared_with_a_bundle(log: Log, rakuten: Run, tmp_path: Path) -> None:
    shop = make_sample(tmp_path / "shop", 300, 3, images=False, progress=False)
    code, report, _ = drift(rakuten, log, shop)
    moved = {c["name"] for c in report["comparisons"] if c["moved"]}
    assert code == 3 and "has_picture" in moved, "the bundle was trained with pictures"
    assert last_drift_reports(log.store) == [], "a catalogue is no window of the log"

@pytest.mark.parametrize("options", [("--last", "week"), ("--since", "yesterday"), ("--until", "32/13")], ids=" ".join)
def test_a_wrong_time_is_one_line(options: tuple[str, str], log: Log, rakuten: Run) -> None:
    answer = rakuten("drift", *options, extra=log.env)
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1 and options[1] in answer.stderr

@pytest.mark.services
def test_without_a_champion_the_error_says_what_to_do(rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("drift", extra={"RAKUTEN_DATA_DIR": str(tmp_path)})
    assert answer.returncode == 2 and "start the service, or name a bundle with --bundle" in answer.stderr

def test_a_reference_of_an_earlier_release_is_compared(log: Log) -> None:
    import pandas as pd
    values = pd.DataFrame(np.random.default_rng(0).normal(size=(500, 2)), columns=["title_chars", "digits"])
    window = Window(values + np.array([3, 0]), np.full(500, 10), np.full(500, 0.9), [str(i) for i in range(500)])
    report = drift_report("a" * 12, reference_profile(values), 500, window)
    assert [c.name for c in report.moved] == ["title_chars"] and len(report.comparisons) == 2

def test_one_moved_window_is_no_alarm() -> None:
    params = DriftParams()
    assert [confirmed(w, params) for w in ([True], [True, False, False], [True, False, True], [True, True])] == [
        False, False, True, True]
    assert not confirmed([False, True, True], params), "the traffic is as before again"
