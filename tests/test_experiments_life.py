"Experiments, promotions, rollbacks and the monitor: what they rest on, what they change, what they do in an outage."
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from api_process import free_port
from conftest import Run, needs_postgres, once
from test_architecture import ALONE, light_set

from rakuten_nb.config import Settings
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.profile import product_numbers
from rakuten_nb.data.sample import make_sample
from rakuten_nb.errors import InputError
from rakuten_nb.evaluation.abtest import AbtestParams
from rakuten_nb.models.bundle import save_bundle, verify_bundle
from rakuten_nb.models.training import TrainParams, train
from rakuten_nb.operations.experiments import (
    DeploymentChanged,
    begin_experiment,
    experiment_report,
    fetch_model,
    fixed_rule,
    promote_model,
    rollback_model,
)
from rakuten_nb.operations.monitor import Child, Finding, MonitorSections, Pass, failure, run_parts, run_pass
from rakuten_nb.store.database import Store, open_store, predictions, tables
from rakuten_nb.store.decisions import add_decision, list_decisions
from rakuten_nb.store.deployments import Deployment, adopt, current_deployment, list_deployments
from rakuten_nb.store.drift_reports import last_drift_reports
from rakuten_nb.store.exposures import (
    CanaryCounts,
    audit_samples,
    canary_counts,
    champion_figures,
    recent_answers,
    shadow_counts,
    variant_figures,
)

A, B, X = "a" * 12, "b" * 12, "exp-1"
NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)
DATABASES = ["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, needs_postgres])]
LETTERS = "abcde"

# --- rows

@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    "An empty store on each database."
    server = request.getfixturevalue("postgres_server") if request.param == "postgresql" else None
    opened = open_store(server.new_database() if server else f"sqlite:///{tmp_path}/store.sqlite")
    yield opened
    opened.close()

def answer(number: int, code: int = 10, **changes: Any) -> dict[str, Any]:
    "An answer of a champion in an experiment."
    return {"id": number, "request_id": f"r{number}", "at": NOW, "user": "marie", "product_id": f"p{number}",
            "prdtypecode": code, "confidence": 0.8, "needs_review": False, "top5": [], "experts": {},
            "model_version": A, "variant": "champion", "profile": [], "experiment": X, "audit": False,
            "review_order": 0.8, "seconds": 0.01} | changes

def shadow(number: int, code: int | None = 10, **changes: Any) -> dict[str, Any]:
    "The challenger's answer beside it."
    return {"prediction": number, "experiment": X, "model_version": B, "prdtypecode": code, "confidence": 0.9,
            "needs_review": False, "top5": [], "seconds": 0.02, "sampled": False, "error": ""} | changes

def label(number: int, code: int = 10, **changes: Any) -> dict[str, Any]:
    "A reviewer's label."
    return {"prediction": number, "user": "rose", "reviewer": True, "at": NOW, "prdtypecode": code,
            "content": ""} | changes

def retained(number: int, content: str) -> dict[str, Any]:
    "A retained product."
    return {"prediction": number, "at": NOW, "for_review": True, "content": content * 64, "imageid": "", "title": "Jeu",
            "description": "", "picture": ""}

def insert(store: Store, **rows: list[dict[str, Any]]) -> None:
    "Insert rows; table → rows."
    with store.writing() as c:
        for name, part in rows.items():
            if part: c.execute(tables.tables[name].insert(), part)

# --- what decisions rest on

def test_health_counts_answers_errors_review_and_times_by_variant(store: Store) -> None:
    insert(store, predictions=[answer(i, needs_review=i < 3, seconds=i / 100) for i in range(101)],
           shadow_predictions=[shadow(i, None if i < 5 else 10, error="OSError" if i < 5 else "", needs_review=i < 25,
                                      seconds=None if i < 5 else 0.5) for i in range(101)],
           variant_errors=[{"at": NOW, "experiment": X, "variant": "champion", "model_version": A, "kind": "OSError"}])
    champion, challenger = variant_figures(store, X)
    assert (champion.variant, champion.answers, champion.errors, champion.review) == ("champion", 102, 1, 3)
    assert (champion.seconds_p50, champion.seconds_p95) == pytest.approx((0.5, 0.95))
    assert (challenger.variant, challenger.model_version) == ("challenger", B)
    assert (challenger.answers, challenger.errors) == (101, 5)
    assert (challenger.review, challenger.seconds_p95) == (20, 0.5), "a failure is no doubtful answer"
    assert variant_figures(store, "another") == []

def test_a_canary_has_the_health_of_both_variants(store: Store) -> None:
    insert(store, predictions=[answer(1), answer(2, variant="challenger", model_version=B, seconds=None)],
           variant_errors=[{"at": NOW, "experiment": X, "variant": "challenger", "model_version": B, "kind": "E"}] * 2)
    challenger, champion = sorted(variant_figures(store, X), key=lambda f: f.answers, reverse=True)
    assert (challenger.variant, challenger.answers, challenger.errors) == ("challenger", 3, 2)
    assert challenger.seconds_p50 is None
    assert (champion.variant, champion.answers) == ("champion", 1)

def test_only_drawn_disagreements_with_a_reviewers_label_count(store: Store) -> None:
    insert(store, predictions=[answer(i, audit=i == 6) for i in range(1, 9)],
           shadow_predictions=[shadow(1), shadow(2, 40, sampled=True), shadow(3, 40, sampled=True), shadow(4, 40),
                               shadow(5, 40, sampled=True), shadow(6, 40), shadow(7, None, error="E", sampled=False),
                               shadow(8, 40, sampled=True)],
           feedback=[label(8, 99), label(1, 40), label(4, 40), label(2, 40), label(5, 40, reviewer=False), label(6)])
    counts = shadow_counts(store, X)
    assert (counts.products, counts.disagreements, counts.drawn) == (7, 6, 5)
    assert counts.differences == [0, 1, -1], "in the order of labels: neither, the challenger, the champion by audit"

def test_a_product_sent_twice_counts_once_with_its_first_answers(store: Store) -> None:
    same = {"product_id": "4711"}
    insert(store, predictions=[answer(1, **same), answer(2, 40, audit=True, **same), answer(3, **same)],
           shadow_predictions=[shadow(1, None, error="OSError"), shadow(2, 10), shadow(3, 40, sampled=True)],
           feedback=[label(3, 10)])
    counts = shadow_counts(store, X)
    assert (counts.products, counts.disagreements, counts.differences) == (1, 1, []), "the label is for another content"
    insert(store, feedback=[label(2, 10)])
    assert shadow_counts(store, X).differences == [1]

@pytest.mark.parametrize("product_id", ["", "  "])
def test_a_label_of_the_same_content_counts_and_the_latest_wins(store: Store, product_id: str) -> None:
    insert(store, predictions=[answer(i, product_id=product_id) for i in range(1, 5)],
           shadow_predictions=[shadow(i, 40, sampled=True) for i in range(1, 5)],
           retained_products=[retained(1, "c"), retained(2, "c"), retained(3, "d")],
           feedback=[label(2, 40, content="c" * 64)])
    counts = shadow_counts(store, X)
    assert (counts.products, counts.differences) == (3, [1]), "the fourth has lost its content and counts as its own"
    insert(store, feedback=[label(1, 10, user="eve", content="c" * 64)])
    assert shadow_counts(store, X).differences == [-1]

def test_a_canary_compares_audited_first_answers(store: Store) -> None:
    new = {"variant": "challenger", "model_version": B, "audit": True}
    insert(store, predictions=[answer(1, **new), answer(2, audit=True), answer(3),
                               answer(4, audit=True, product_id="p2"), answer(5, **new), answer(6, **new),
                               answer(7, product_id="p6", **new)],
           feedback=[label(5, 40), label(1), label(2), label(3), label(4, 40), label(7)])
    assert canary_counts(store, X) == CanaryCounts(champion=[True], challenger=[False, True])

def test_live_accuracy_counts_every_audited_answer_of_a_window(store: Store) -> None:
    old = NOW - timedelta(days=30)
    insert(store, predictions=[answer(1, audit=True, confidence=0.5), answer(2, audit=True, product_id="p1"), answer(3),
                               answer(4, audit=True), answer(5, audit=True, at=old),
                               answer(6, variant="challenger", model_version=B)],
           shadow_predictions=[shadow(1, 40, confidence=0.6), shadow(3, 10), shadow(4, None, error="E")],
           feedback=[label(1), label(2, 40), label(3), label(5), label(4, reviewer=False)])
    samples = {(s.model_version, s.variant): s for s in audit_samples(store, NOW - timedelta(days=7))}
    champion, challenger = samples[A, "champion"], samples[B, "challenger"]
    assert (champion.answers, champion.drawn, champion.right, champion.confidence) == (4, 3, [True, False], [0.5, 0.8])
    assert champion.mean_confidence == pytest.approx((0.5 + 3 * 0.8) / 4)
    assert (challenger.answers, challenger.right, challenger.confidence) == (3, [False], [0.6])
    assert challenger.mean_confidence == pytest.approx((0.6 + 0.9 + 0.8) / 3), "answers in shadow and in a canary"
    assert len(audit_samples(store)[0].right) == 3

def test_windows_of_a_champion_end_where_they_should(store: Store) -> None:
    at = [NOW + timedelta(minutes=i) for i in range(4)]
    failed = {"experiment": "", "variant": "champion", "model_version": A, "kind": "E"}
    insert(store, predictions=[answer(i, 10 * i, at=t) for i, t in enumerate(at, 1)],
           variant_errors=[failed | {"at": t} for t in at])
    assert champion_figures(store, A, at[1], at[3]).answers == 4 and champion_figures(store, A, at[1]).errors == 3
    assert champion_figures(store, B, at[0]).answers == 0
    assert recent_answers(store, A, at[1], at[3]).prdtypecode.tolist() == [30, 20]
    assert recent_answers(store, A, limit=1).prdtypecode.tolist() == [40] and len(recent_answers(store, B)) == 0

def test_decisions_survive_with_their_figures(store: Store) -> None:
    figures = {"difference": 0.03, "guardrails": [], "health": {"champion": {"answers": 3}}}
    d = adopt(store, A, "", "first")
    add_decision(store, "rule", "abtest", "promote", "é" * 1000, figures, acted=False, deployment=d)
    add_decision(store, "marie", "rollback", "rollback", "errors")
    latest, first = list_decisions(store)
    assert (first.figures, first.champion, first.acted, len(first.reason)) == (figures, A, False, 1000)
    assert latest.champion == "" and [x.who for x in list_decisions(store, kind="abtest")] == ["rule"]

# --- models

@pytest.fixture(scope="session")
def models(shared: Path) -> Path:
    "Five small bundles, a to e, which differ in their review threshold."
    def make(part: Path) -> None:
        params = TrainParams.model_validate({"split": {"folds": 2}})
        catalog = read_catalog(make_sample(part / "sample", 200, images=False, progress=False))
        bundle, _ = train(catalog, params, "text_linear")
        for i, letter in enumerate(LETTERS): save_bundle(replace(bundle, threshold=0.4 + i / 20), part / letter)
    return once(shared / "life_models", make)

@dataclass
class Home:
    "A data directory with a store, and the command line over it."
    folder: Path
    models: Path
    rakuten: Run
    settings: Settings
    store: Store

    @property
    def env(self) -> dict[str, str]:
        "The environment of its processes."
        return {"RAKUTEN_DATA_DIR": str(self.folder / "data"), "RAKUTEN_LOG_DIR": str(self.folder / "logs"),
                "MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

    def run(self, *args: object, code: int = 0, **extra: str) -> str:
        "Run a command; its output on both streams."
        done = self.rakuten(*args, extra=self.env | extra)
        output = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in output, output
        return output

    def version(self, letter: str) -> str:
        "The version of a bundle."
        return str(verify_bundle(self.models / letter)["self"])[:12]

    def current(self) -> Deployment:
        "What is to be served."
        deployment = current_deployment(self.store)
        assert deployment is not None
        return deployment

    def json(self, *args: object, code: int = 0) -> Any:
        "The JSON that a command writes."
        self.run(*args, "--json", self.folder / "out.json", code=code)
        return json.loads((self.folder / "out.json").read_text(encoding="utf-8"))

    def params(self, text: str) -> Path:
        "Write a params.yaml."
        (path := self.folder / "params.yaml").write_text(text, encoding="utf-8")
        return path

@pytest.fixture
def home(tmp_path: Path, models: Path, rakuten: Run) -> Iterator[Home]:
    "A data directory whose champion is model a."
    settings = Settings(_env_file=None, rakuten_data_dir=tmp_path / "data", rakuten_log_dir=tmp_path / "logs",
                        mlflow_tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    store = open_store(settings.database_url)
    first = fetch_model(store, settings, str(models / "a"))
    adopt(store, first.version, first.source, "the first bundle")
    yield Home(tmp_path, models, rakuten, settings, store)
    store.close()

def last_id(store: Store) -> int:
    "The number of the last prediction."
    with store.reading() as c: return int(c.execute(sa.select(sa.func.max(predictions.c.id))).scalar() or 0)

def add_answers(home: Home, version: str, n: int, review: int = 0, **changes: Any) -> int: # the first id
    "Answers of a champion now; the first ones need review."
    start, now = last_id(home.store) + 1, datetime.now(UTC)
    row = lambda i: answer(start + i, model_version=version, at=now, needs_review=i < review, experiment="") | changes
    insert(home.store, predictions=[row(i) for i in range(n)])
    return start

def add_experiment(home: Home, products: int, disagreements: int, labels: int, challenger_right: int) -> Deployment:
    "Start an experiment with model b, and add what it shows."
    d = begin_experiment(home.store, home.settings, str(home.models / "b"), AbtestParams(), "marie", "more data")
    start = add_answers(home, d.champion, products, experiment=d.experiment)
    beside = [shadow(start + i, 40 if i < disagreements else 10, experiment=d.experiment, model_version=d.challenger,
                     sampled=i < labels, seconds=0.01) for i in range(products)]
    given = [label(start + i, 40 if i < challenger_right else 10) for i in range(labels)]
    insert(home.store, shadow_predictions=beside, feedback=given)
    return d

BETTER, WORSE, EQUAL, EARLY = (1000, 120, 60, 55), (1000, 120, 60, 5), (4000, 0, 0, 0), (300, 30, 5, 3)

# --- commands

def test_promote_and_roll_back(home: Home) -> None:
    a, b, c = (home.version(letter) for letter in "abc")
    assert f"promote: model {b} is the champion" in home.run("promote", home.models / "b", "--reason", "more data")
    assert home.current().champion == b and home.current().champion_source == str(home.models / "b")
    home.run("promote", home.models / "c", "--reason", "more still")
    assert "is the champion already; nothing was changed" in home.run("promote", c, "--reason", "again")
    home.run("rollback", "--reason", "errors")
    home.run("rollback", "--reason", "errors still")
    assert [d.champion for d in list_deployments(home.store)] == [a, b, c, b, a]
    assert "rollback: expected an earlier champion" in home.run("rollback", "--reason", "further", code=2)
    assert home.run("promote", b, "--reason", "mended") and home.current().champion == b, "by its copy"

def test_every_change_is_a_decision_with_its_reason_and_a_line_in_the_log(home: Home) -> None:
    add_experiment(home, *EARLY)
    home.run("abtest", "stop", "--reason", "the labels were wrong")
    home.run("promote", home.models / "b", "--reason", "better")
    home.run("rollback", "--reason", "errors")
    rows = home.json("decisions")
    assert [(d["kind"], d["outcome"], d["reason"]) for d in rows] == [
        ("rollback", "rollback", "errors"), ("promote", "promote", "better"),
        ("abtest", "stop", "the labels were wrong"), ("abtest", "start", "more data")]
    assert rows[2]["experiment"] and rows[2]["challenger"] == rows[0]["champion"] == home.version("b")
    lines = (home.folder / "logs/decisions.log").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    assert [line["reason"] for line in logged] == ["the labels were wrong", "better", "errors"]
    assert logged[1]["figures"]["deployment"] == rows[1]["figures"]["deployment"]
    assert json.loads(home.run("decisions", "--json", "--limit", "1")) == rows[:1]
    table = home.run("decisions", "--kind", "rollback")
    assert "errors" in table and "better" not in table

@pytest.mark.parametrize("args", [
    ("abtest", "start", "--challenger", "b"), ("abtest", "stop"), ("promote", "b"), ("rollback",)])
def test_a_change_needs_a_reason(home: Home, args: tuple[str, ...]) -> None:
    paths = [home.models / "b" if a == "b" else a for a in args]
    assert "Missing option '--reason'" in home.run(*paths, code=2)
    assert "--reason: expected a text" in home.run(*paths, "--reason", " ", code=2)
    assert len(list_deployments(home.store)) == 1 and list_decisions(home.store) == []

@pytest.mark.services
def test_a_rollback_needs_neither_registry_nor_network(home: Home) -> None:
    home.run("promote", home.models / "b", "--reason", "better")
    output = home.run("rollback", "--reason", "errors", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    assert home.current().champion == home.version("a")
    (warning,) = [line for line in output.splitlines() if line.startswith("warning:")]
    assert "the registry does not follow yet: MLflow at http://127.0.0.1:" in warning
    assert "connection refused" in warning

def test_the_copies_of_earlier_champions_stay(home: Home) -> None:
    for letter in "bc": home.run("promote", home.models / letter, "--reason", "better")
    for letter in "de":
        home.run("abtest", "start", "--challenger", home.models / letter, "--reason", "a try")
        home.run("abtest", "stop", "--reason", "enough")
    copies = {path.name for path in (home.folder / "data/models").iterdir() if not path.name.startswith(".")}
    assert {home.version(letter) for letter in "abce"} <= copies
    for letter in "ba":
        home.run("rollback", "--reason", "errors")
        assert home.current().champion == home.version(letter)

@pytest.mark.parametrize(("what", "decision", "code"), [
    (EARLY, "continue", 0), (BETTER, "promote", 0), (WORSE, "stop", 3), (EQUAL, "inconclusive", 3)],
    ids=["early", "better", "worse", "equal"])
def test_the_report_tells_a_scheduler_what_follows(home: Home, what: tuple[int, ...], decision: str, code: int) -> None:
    add_experiment(home, *what)
    report = home.json("abtest", "report", code=code)
    assert (report["decision"], report["mode"], report["share"]) == (decision, "shadow", 1.0)
    assert report["figures"]["products"] == what[0] and report["figures"]["labels"] == what[2]
    assert [v["variant"] for v in report["variants"]] == ["champion", "challenger"]
    assert home.current().experiment == report["experiment"], "a report changes nothing"

def test_a_report_without_an_experiment_is_refused(home: Home) -> None:
    assert "experiment: expected one that is running; found none" in home.run("abtest", "report", code=2)
    assert "expected one that is running" in home.run("abtest", "stop", "--reason", "enough", code=2)
    assert "expected a model, or a running experiment" in home.run("promote", "--reason", "better", code=2)

def test_the_rule_is_that_of_params_yaml_and_fixed_at_the_start(home: Home) -> None:
    path = home.params("abtest: {mode: canary, canary_share: 0.2, min_labels: 7}")
    home.run("abtest", "start", "--challenger", home.models / "b", "--reason", "a try", "--params", path)
    d = home.current()
    assert (d.mode, d.share, d.rule["min_labels"], d.rule["canary_share"]) == ("canary", 0.2, 7, 0.2)
    home.params("abtest: {min_labels: 1}")
    assert experiment_report(home.store).figures["mode"] == "canary"
    again = ("abtest", "start", "--challenger", home.models / "c", "--reason", "x")
    assert "is still running; stop it" in home.run(*again, code=2)

@pytest.mark.parametrize(("options", "message"), [
    (("--mode", "canary", "--share", "1"), "canary_share: expected less than 1"),
    (("--share", "0"), "shadow_share: expected greater than 0"),
    (("--mode", "off"), "expected shadow or canary"),
    (("--share", "nan"), "shadow_share: expected a finite number")], ids=["one", "zero", "off", "nan"])
def test_a_wrong_share_or_mode_is_refused(home: Home, options: tuple[str, ...], message: str) -> None:
    output = home.run("abtest", "start", "--challenger", home.models / "b", "--reason", "a try", *options, code=2)
    assert message in output and not home.current().experiment

@pytest.mark.parametrize(("model", "message"), [
    ("0" * 12, "expected a copy in"), ("nowhere", "bundle.json: cannot be read"),
    ("models:/x/y/z", "expected models:/NAME@ALIAS"), pytest.param(
        "models:/none@challenger", "is not registered", marks=pytest.mark.services)])
def test_an_unknown_model_is_refused(home: Home, model: str, message: str) -> None:
    for command in (["promote", model], ["abtest", "start", "--challenger", model]):
        assert message in home.run(*command, "--reason", "a try", code=2)
    assert len(list_deployments(home.store)) == 1

def test_a_damaged_challenger_is_not_promoted(home: Home) -> None:
    d = add_experiment(home, *BETTER)
    arrays = home.folder / "data/models" / d.challenger / "experts/text_linear/arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"?")
    with home.store.writing() as c: c.exec_driver_sql("UPDATE deployments SET challenger_source = ''")
    assert "arrays.npz: differs from what was saved" in home.run("promote", "--reason", "better", code=2)
    assert home.current() == replace(d, challenger_source="")

def test_a_damaged_copy_is_fetched_again_from_its_source(home: Home) -> None:
    d = add_experiment(home, *BETTER)
    (home.folder / "data/models" / d.challenger / "bundle.json").unlink()
    home.run("promote", "--reason", "better")
    assert home.current().champion == d.challenger and verify_bundle(home.folder / "data/models" / d.challenger)

# --- two that decide at the same time

def test_of_several_rollbacks_by_rule_one_is_done(home: Home) -> None:
    for letter in "bc": promote_model(home.store, home.settings, str(home.models / letter), "marie", "better")
    seen = home.current()
    def roll_back(_: int) -> str:
        try: return rollback_model(home.store, "monitor", "errors", expected=seen).champion
        except DeploymentChanged as e: return str(e)
    with ThreadPoolExecutor(4) as pool: answers = sorted(pool.map(roll_back, range(4)))
    assert answers.count(home.version("b")) == 1 and home.current().champion == home.version("b")
    assert sum("expected it to be the last one" in answer for answer in answers) == 3

def test_a_rule_does_not_promote_what_a_person_has_stopped(home: Home) -> None:
    d = add_experiment(home, *BETTER)
    report = experiment_report(home.store)
    home.run("abtest", "stop", "--reason", "the labels were wrong")
    with pytest.raises(DeploymentChanged, match="found stop by"):
        promote_model(home.store, home.settings, d.challenger, "monitor", report.reason, expected=report.deployment)
    assert home.current().champion == home.version("a")

def test_a_rule_of_an_unknown_release_is_one_line(home: Home) -> None:
    add_experiment(home, *EARLY)
    with home.store.writing() as c: c.exec_driver_sql("""UPDATE deployments SET rule = '{"alpha": 0.05, "power": 2}'""")
    with pytest.raises(InputError, match=r"rule of experiment \w+: power: is not known"): experiment_report(home.store)
    assert fixed_rule(AbtestParams(), "canary", 0.3).canary_share == 0.3

# --- the monitor

def outcomes(findings: list[Finding]) -> dict[str, str]:
    "Part → outcome."
    return {f.part: f.outcome for f in findings}

def one_pass(home: Home, params: str = "", dry_run: bool = False) -> dict[str, Finding]: # part → finding
    "One pass of the monitor."
    return {f.part: f for f in run_pass(home.settings, home.folder, home.params(params), dry_run)}

ALLOWED = "retrain: {auto_promote: true}"

def test_a_dry_run_says_what_it_would_do_and_changes_nothing(home: Home) -> None:
    d = add_experiment(home, *BETTER)
    before = list_decisions(home.store)
    output = home.run("monitor", "--dry-run", "--params", home.params(ALLOWED))
    would = f"abtest: promote: would promote model {d.challenger}: experiment {d.experiment}: the challenger is better"
    assert would in output
    assert home.current() == d and list_decisions(home.store) == before
    assert not (home.folder / "data/monitor.json").exists()

def test_without_permission_it_records_what_it_would_do_once(home: Home) -> None:
    d = add_experiment(home, *BETTER)
    for _ in range(3): assert "retrain.auto_promote is false" in one_pass(home)["abtest"].text
    assert home.current() == d
    first, start = list_decisions(home.store, kind="abtest")
    assert (first.who, first.outcome, first.acted, first.figures["labels"]) == ("monitor", "promote", False, 60)
    assert start.outcome == "start"

def test_it_promotes_watches_and_rolls_back(home: Home) -> None:
    a, b = home.version("a"), home.version("b")
    add_answers(home, a, 300, review=30)
    add_experiment(home, *BETTER)
    output = home.run("monitor", "--params", home.params(ALLOWED))
    assert f"abtest: promote: model {b} is the champion" in output and home.current().champion == b
    add_answers(home, b, 300, review=30)
    assert outcomes(list(one_pass(home).values()))["watch"] == "continue" and home.current().champion == b
    add_answers(home, b, 300, review=290)
    found = one_pass(home)["watch"]
    assert found.acted and f"model {a} is the champion again: guardrail violated: review: 53.3% of 600" in found.text
    assert home.current().champion == a and one_pass(home)["watch"].outcome == "quiet"
    assert [(d.who, d.kind, d.outcome) for d in list_decisions(home.store)] == [
        ("monitor", "rollback", "rollback"), ("monitor", "promote", "promote"), ("marie", "abtest", "start")]
    assert list_decisions(home.store)[0].figures["champion"]["answers"] == 600
    assert list_decisions(home.store)[1].figures["challenger_right"] == 55

def test_errors_of_a_promoted_model_roll_back(home: Home) -> None:
    home.run("promote", home.models / "b", "--reason", "better")
    b = home.version("b")
    add_answers(home, b, 300)
    failed = {"at": datetime.now(UTC), "experiment": "", "variant": "champion", "model_version": b, "kind": "OSError"}
    insert(home.store, variant_errors=[failed] * 30)
    assert "guardrail violated: errors: 9.1% of 330" in one_pass(home)["watch"].text
    assert home.current().champion == home.version("a")

def test_wrong_answers_of_a_promoted_model_roll_back(home: Home) -> None:
    a, b = home.version("a"), home.version("b")
    start = add_answers(home, a, 100, audit=True)
    insert(home.store, feedback=[label(start + i) for i in range(100)])
    home.run("promote", home.models / "b", "--reason", "better")
    start = add_answers(home, b, 40, audit=True)
    insert(home.store, feedback=[label(start + i, 40) for i in range(30)])
    assert "accuracy: 0 of 30 audited answers right" in one_pass(home)["watch"].text
    assert home.current().champion == a

@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_wrong_does_not_blind_the_watch(home: Home, hours: int) -> None:
    add_answers(home, home.version("a"), 300)
    home.run("promote", home.models / "b", "--reason", "better")
    add_answers(home, home.version("b"), 300, review=300, at=datetime.now(UTC) + timedelta(hours=hours))
    assert one_pass(home)["watch"].outcome == "rollback" and home.current().champion == home.version("a")

def test_a_model_promoted_again_is_watched_by_its_new_answers(home: Home) -> None:
    add_answers(home, home.version("a"), 300)
    home.run("promote", home.models / "b", "--reason", "better")
    add_answers(home, home.version("b"), 300, review=300)
    assert one_pass(home)["watch"].outcome == "rollback"
    home.run("promote", home.models / "b", "--reason", "the queue was full for another reason")
    assert one_pass(home)["watch"].outcome == "continue" and home.current().champion == home.version("b")

def test_a_watch_ends_with_a_decision(home: Home) -> None:
    home.run("promote", home.models / "b", "--reason", "better")
    text = "abtest: {watch_minutes: 0}"
    assert [one_pass(home, text)["watch"].outcome for _ in range(2)] == ["passed", "quiet"]
    (passed,) = list_decisions(home.store, kind="watch")
    assert (passed.outcome, passed.figures["deployment"]) == ("passed", home.current().id)

def test_an_old_promotion_is_not_rolled_back(home: Home) -> None:
    home.run("promote", home.models / "b", "--reason", "better")
    with home.store.writing() as c: c.exec_driver_sql("UPDATE deployments SET at = '2026-01-01 00:00:00'")
    add_answers(home, home.version("b"), 300, review=300)
    assert one_pass(home)["watch"].outcome == "quiet" and home.current().champion == home.version("b")

@pytest.mark.parametrize(("what", "outcome"), [(WORSE, "stop"), (EQUAL, "inconclusive")], ids=["worse", "equal"])
def test_it_ends_an_experiment_without_permission(home: Home, what: tuple[int, ...], outcome: str) -> None:
    d = add_experiment(home, *what)
    assert one_pass(home)["abtest"].outcome == outcome
    after = home.current()
    assert (after.action, after.champion, after.experiment, after.who) == ("stop", d.champion, "", "monitor")
    decision = list_decisions(home.store, 1, "abtest")[0]
    assert decision.figures["decision"] == outcome and decision.experiment == d.experiment and decision.acted

def test_drift_is_confirmed_by_a_second_window_and_calls_for_a_retraining(home: Home) -> None:
    profile = list(product_numbers("Brand new garden item with free shipping", "", False).values())
    for alarm in (False, True):
        add_answers(home, home.version("a"), 250, profile=profile)
        found = one_pass(home)
        assert found["drift"].outcome == ("drift" if alarm else "quiet") and "have moved" in found["drift"].text
        assert ("because of drift" in found["retrain"].text) == alarm
    (decision,) = list_decisions(home.store, kind="drift")
    assert decision.outcome == "drift" and decision.figures["rows"] == 250 and not decision.acted
    assert any(c["moved"] for c in decision.figures["comparisons"])
    assert one_pass(home)["drift"].outcome == "drift", "nothing new, and the alarm holds"
    add_answers(home, home.version("a"), 250, profile=profile)
    before = len(last_drift_reports(home.store))
    assert one_pass(home, dry_run=True)["drift"].outcome == "drift" and len(last_drift_reports(home.store)) == before

def test_low_accuracy_calls_for_a_retraining_it_may_not_start(home: Home) -> None:
    start = add_answers(home, home.version("a"), 300, audit=True)
    insert(home.store, feedback=[label(start + i, 40) for i in range(200)])
    found = one_pass(home)
    assert found["accuracy"].outcome == "low" and "live 0.0%" in found["accuracy"].text
    assert found["retrain"].outcome == "due" and "because of accuracy, but not now" in found["retrain"].text
    assert [d.outcome for d in list_decisions(home.store, kind="accuracy")] == ["low"]
    insert(home.store, feedback=[label(start + i, 10, user="eve") for i in range(200)])
    assert one_pass(home)["accuracy"].outcome == "quiet"
    assert [d.outcome for d in list_decisions(home.store, kind="accuracy")] == ["recovered", "low"]

def add_retraining(home: Home, step: str, **changes: Any) -> str: # its id
    "A retraining that waits at a step."
    now = datetime.now(UTC)
    row = {"id": "5eed5eed5eed", "started": now, "updated": now, "because": "drift", "step": step, "status": "running",
           "process": "", "model_version": "", "experiment": "", "steps": {}, "message": "for labels"} | changes
    insert(home.store, retrainings=[row])
    return str(row["id"])

def test_a_retraining_that_waits_for_its_experiment_is_left_alone(home: Home) -> None:
    d = add_experiment(home, *EARLY)
    number = add_retraining(home, "decide", experiment=d.experiment)
    found = one_pass(home)["retrain"]
    assert (found.outcome, found.acted) == ("waiting", False)
    assert f"retraining {number}, step decide: for labels" in found.text

def test_a_retraining_goes_on_once_its_experiment_has_ended(home: Home) -> None:
    d = add_experiment(home, *WORSE)
    number = add_retraining(home, "decide", experiment=d.experiment)
    params = home.params("")
    assert f"would continue retraining {number}" not in home.run("monitor", "--dry-run", "--params", params)
    output = home.run("monitor", "--params", params)
    assert f"retrain: resume: continues retraining {number}, step decide" in output
    assert re.search(r"^retrain: exit 2: .*expected a project with dvc.yaml", output, re.MULTILINE), "the process ran"

def test_an_interrupted_retraining_needs_permission(home: Home) -> None:
    add_retraining(home, "train", process="elsewhere:1", updated=datetime.now(UTC) - timedelta(hours=1))
    found = one_pass(home)["retrain"]
    assert found.outcome == "interrupted" and "`rakuten-nb retrain --resume` continues it" in found.text
    assert one_pass(home, "retrain: {auto_retrain: true}", dry_run=True)["retrain"].outcome == "resume"

def test_a_retraining_at_work_is_not_disturbed(home: Home) -> None:
    add_retraining(home, "train", process="elsewhere:1")
    assert one_pass(home, "retrain: {auto_retrain: true}")["retrain"].outcome == "running"

def test_a_part_that_fails_is_one_line_and_the_others_run(home: Home) -> None:
    (home.folder / "data/models" / home.version("a") / "bundle.json").write_text("{")
    add_experiment(home, *WORSE)
    output = home.run("monitor", "--params", home.params(""), code=1)
    failed = [line for line in output.splitlines() if " failed: " in line]
    assert len(failed) == 2 and all("bundle.json" in line for line in failed), "drift and accuracy need the bundle"
    assert "abtest: stop: ended" in output and "registry: quiet" in output
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "drift, accuracy failed" in error

def test_a_wrong_params_file_is_one_line(home: Home) -> None:
    for text, part in (("abtest: {alpha: 2}", "abtest.alpha"), ("monitor: {every: 1}", "monitor.every: is not known"),
                       ("retrain: {auto_promote: perhaps}", "retrain.auto_promote")):
        output = home.run("monitor", "--params", home.params(text), code=1)
        assert part in output.splitlines()[0]
    assert "--every: expected a time" in home.run("monitor", "--every", "soon", code=2)

def test_the_status_file_shows_the_last_pass(home: Home) -> None:
    home.run("monitor", "--params", home.params(""))
    status = json.loads((home.folder / "data/monitor.json").read_text(encoding="utf-8"))
    assert {f["part"] for f in status["findings"]} >= {"watch", "abtest", "accuracy", "retrain", "registry"}
    assert datetime.fromisoformat(status["at"]).tzinfo is not None
    (home.folder / "data/monitor.json").unlink()
    (home.folder / "data/monitor.json").mkdir()
    assert "status: failed: " in home.run("monitor", "--params", home.params(""), code=1)

def read_until(process: "subprocess.Popen[str]", found: Callable[[str], bool], seconds: float = 60) -> str:
    "The first line of a process that matches."
    assert process.stdout
    end = time.monotonic() + seconds
    while time.monotonic() < end and (line := process.stdout.readline()):
        if found(line): return line
    pytest.fail("the process ended, or said nothing of this")

def test_the_loop_goes_on_when_the_database_is_back(home: Home, env: dict[str, str]) -> None:
    add_experiment(home, *WORSE)
    home.store.close()
    data, away = home.folder / "data", home.folder / "away"
    data.rename(away)
    data.touch() # a file where the data directory should be
    command = [sys.executable, "-m", "rakuten_nb.cli", "monitor", "--every", "1s", "--params", str(home.params(""))]
    with subprocess.Popen(command, env=env | home.env | {"PYTHONUNBUFFERED": "1"}, cwd=home.folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert "cannot be written" in read_until(process, lambda line: " pass: failed: " in line)
            data.unlink()
            away.rename(data)
            assert "ended: experiment" in read_until(process, lambda line: " abtest: stop: " in line)
        finally: process.terminate()
        assert process.wait(30) == 0

@pytest.mark.services
@needs_postgres
def test_the_loop_goes_on_when_postgresql_is_back(home: Home, env: dict[str, str], postgres_server: Any) -> None:
    url = postgres_server.new_database()
    store = open_store(url)
    adopt(store, home.version("a"), str(home.models / "a"), "the first bundle")
    store.close()
    command = [sys.executable, "-m", "rakuten_nb.cli", "monitor", "--every", "1s", "--params", str(home.params(""))]
    own = env | home.env | {"PYTHONUNBUFFERED": "1", "RAKUTEN_DATABASE_URL": url}
    with subprocess.Popen(command, env=own, cwd=home.folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            read_until(process, lambda line: " registry: " in line)
            with postgres_server.stopped():
                line = read_until(process, lambda line: " pass: failed: " in line)
                assert "database postgresql" in line and url.split(":")[2].split("@")[0] not in line
            read_until(process, lambda line: " watch: quiet" in line)
        finally: process.terminate()
        assert process.wait(30) == 0

@pytest.mark.services
def test_the_registry_follows_with_the_next_pass(home: Home) -> None:
    from rakuten_nb.tracking.registry import MODEL_NAME, aliases, open_tracking
    with open_tracking(home.settings) as mlflow:
        client = mlflow.MlflowClient()
        client.create_registered_model(MODEL_NAME)
        for letter in "ab":
            digest = verify_bundle(home.models / letter)["self"]
            client.create_model_version(MODEL_NAME, (home.models / letter).as_uri(), tags={"bundle": digest})
    d = add_experiment(home, *BETTER)
    away = home.settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        found = {f.part: f for f in run_pass(away, home.folder, home.params(ALLOWED))}
    assert found["registry"].outcome == "unavailable" and found["abtest"].acted
    assert "alias champion is now version 2" in one_pass(home)["registry"].text
    with open_tracking(home.settings) as mlflow:
        assert aliases(mlflow) == {"champion": "2"}
        tag = mlflow.MlflowClient().get_model_version(MODEL_NAME, "2").tags["decision"]
    assert tag.startswith("promote by monitor, ") and "the challenger is better" in tag
    home.run("promote", home.version("a"), "--reason", "a complaint")
    with open_tracking(home.settings) as mlflow: assert aliases(mlflow)["champion"] == "1"
    assert d.challenger == home.version("b")

def test_a_change_by_a_person_during_a_pass_is_no_failure(home: Home) -> None:
    seen = add_experiment(home, *WORSE)
    home.run("promote", "--reason", "in a hurry")
    work = Pass(home.store, home.settings, home.folder, MonitorSections(), deployment=seen)
    found = {f.part: f for f in run_parts(work, Child())}
    assert found["abtest"].outcome == "quiet" and found["watch"].outcome == "continue"
    assert failure("watch", DeploymentChanged("found another")).outcome == "changed"

# Runs the command line in a process that finds only the light set.
ARGV = "import os; sys.argv = ['rakuten-nb', *os.environ['LINE'].split()]"
LIGHT_CLI = ALONE.replace("importlib.import_module(module)", f"{ARGV}\nimportlib.import_module(module).run()")

@pytest.mark.services
def test_the_image_that_serves_can_decide_without_mlflow(home: Home, env: dict[str, str]) -> None:
    def run(line: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIGHT_CLI, "rakuten_nb.cli", *light_set()]
        return subprocess.run(command, env=env | home.env | {"LINE": line}, cwd=home.folder, capture_output=True,
                              text=True, check=False)
    home.run("promote", home.models / "b", "--reason", "better")
    answer = run("monitor")
    assert answer.returncode == 0 and "registry: quiet: not registered in MLflow" in answer.stdout, answer.stderr
    (home.folder / "mlflow.db").touch()
    answer = run("rollback --reason errors")
    assert answer.returncode == 0 and home.current().champion == home.version("a"), answer.stderr
    assert "warning: the registry does not follow yet: the registry cannot be asked here: " in answer.stderr
    answer = run("promote models:/m/1 --reason better")
    assert answer.returncode == 2 and "is not installed; MLflow is part of the training requirements" in answer.stderr
    assert "Traceback" not in answer.stderr
