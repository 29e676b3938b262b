"Champion and challenger beside each other in real processes: shadow, canary, promotion, rollback and failures."
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from api_process import ApiProcess, JobWorker

from rakuten_nb.models.bundle import load_bundle, save_bundle
from rakuten_nb.store.database import (
    Store,
    decisions,
    feedback,
    predictions,
    retained_products,
    shadow_predictions,
)
from rakuten_nb.store.deployments import current_deployment, find_deployment_reports, list_deployments
from rakuten_nb.store.feedback import find_queued
from rakuten_nb.store.model_copies import copy_bundle

KINDS = ("Piscine ronde", "Roman policier", "Figurine Pop", "Console de jeux", "Coussin décoratif", "Carte Pokemon")
TITLES = [f"{kind} {n}" for n in range(6) for kind in KINDS]
ADMIN = {"marie": "user", "rene": "reviewer", "root": "admin"}

services = pytest.mark.services # real processes; the fast tests have one of each kind

@pytest.fixture(scope="session")
def twin(shared: Path, bundle: Path) -> Path:
    "A bundle with the same answers as `bundle`, another review threshold and so another version."
    from conftest import once
    model = load_bundle(bundle)
    return once(shared / "twin", lambda part: save_bundle(replace(model, threshold=model.threshold * 0.99), part))

@pytest.fixture(scope="session")
def worse(shared: Path, bundle: Path) -> Path:
    "A bundle whose text expert answers the opposite; its hashes are valid."
    from conftest import once
    model = load_bundle(bundle)
    state = model.experts["text_linear"].state # type: ignore[attr-defined]
    state["weights"] = -state["weights"]
    return once(shared / "worse", lambda part: save_bundle(model, part))

@pytest.fixture
def running(own_api: ApiProcess, twin: Path, worse: Path) -> Iterator[ApiProcess]:
    "An API with copies of both challengers in its data directory, and with users."
    for folder in (twin, worse): copy_bundle(folder, own_api.home / "data/models")
    own_api.env |= {"RAKUTEN_UNREVIEWED_RETENTION_MINUTES": "0"}
    own_api.start()
    own_api.add_users(**ADMIN)
    yield own_api

def rows(store: Store, table: sa.Table) -> list[dict[str, Any]]:
    "All rows of a table, ordered by primary key."
    query = sa.select(table).order_by(*table.primary_key)
    with store.reading() as c: return [dict(r) for r in c.execute(query).mappings()]

def eventually(condition: Callable[[], Any], within: float = 20) -> Any:
    "The first true value of a condition."
    deadline = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value

def change(api: ApiProcess, method: str, route: str, **body: Any) -> dict[str, Any]:
    "Send a change as an administrator and wait until the process follows it."
    answer = api.client.request(method, route, json={"reason": "a test"} | body, headers=api.token("root"))
    assert answer.status_code in (200, 201), answer.text
    store = api.store()
    eventually(lambda: find_deployment_reports(store, answer.json()["deployment"]))
    store.close()
    return dict(answer.json())

def versions(api: ApiProcess, titles: list[str] = TITLES) -> list[str]:
    "The model that answers each title."
    headers = api.token()
    return [api.predict(headers, t, product_id=str(i)).json()["model_version"] for i, t in enumerate(titles)]

def version_of(folder: Path) -> str:
    "The version of a bundle."
    return load_bundle(folder).version

# --- shadow and canary

def test_a_shadow_challenger_answers_beside_the_champion_and_changes_nothing(
        running: ApiProcess, bundle: Path, worse: Path) -> None:
    headers = running.token()
    before = [running.predict(headers, t, product_id=str(i)).json()["predictions"] for i, t in enumerate(TITLES)]
    started = change(running, "POST", "/experiment", challenger=version_of(worse))
    after = [running.predict(headers, t, product_id=str(i)).json() for i, t in enumerate(TITLES)]
    assert [a["predictions"] for a in after] == before and {a["model_version"] for a in after} == {version_of(bundle)}
    store = running.store()
    shadows = eventually(lambda: len(found := rows(store, shadow_predictions)) == len(TITLES) and found)
    logged = {r["id"]: r for r in rows(store, predictions)}
    assert {logged[s["prediction"]]["experiment"] for s in shadows} == {started["experiment"]}
    assert {s["model_version"] for s in shadows} == {version_of(worse)} and {s["error"] for s in shadows} == {""}
    differ = [s for s in shadows if s["prdtypecode"] != logged[s["prediction"]]["prdtypecode"]]
    assert len(differ) > len(TITLES) / 2 and all(s in differ for s in shadows if s["sampled"])
    assert all(s["seconds"] > 0 for s in shadows)
    line = f'rakuten_variant_predictions_total{{model_version="{version_of(worse)}",variant="challenger"}} 36.0'
    assert line in running.client.get("/metrics").text
    store.close()

@services
def test_sampled_disagreements_wait_for_review_without_a_mark(running: ApiProcess, worse: Path) -> None:
    change(running, "POST", "/experiment", challenger=version_of(worse))
    versions(running)
    store = running.store()
    eventually(lambda: len(rows(store, shadow_predictions)) == len(TITLES))
    sampled = {s["prediction"] for s in rows(store, shadow_predictions) if s["sampled"]}
    assert sampled and sampled <= {q.id for q in find_queued(store, limit=100)}
    page = running.client.get("/review", params={"limit": 100}, headers=running.token("rene")).json()
    assert sampled <= {item["id"] for item in page["items"]}
    assert not {"audit", "sampled", "challenger", "experiment", "variant"} & set(page["items"][0])
    store.close()

def test_a_canary_answers_its_share_and_the_same_products_each_time(
        running: ApiProcess, bundle: Path, twin: Path) -> None:
    change(running, "POST", "/experiment", challenger=version_of(twin), mode="canary", share=0.5)
    first = versions(running)
    assert set(first) == {version_of(bundle), version_of(twin)} and versions(running) == first
    store = running.store()
    eventually(lambda: len(rows(store, predictions)) == 2 * len(TITLES))
    logged = rows(store, predictions)
    assert all((r["variant"] == "challenger") == (r["model_version"] == version_of(twin)) for r in logged)
    assert rows(store, shadow_predictions) == []
    store.close()

@services
def test_rows_of_a_job_take_part_in_an_experiment(running: ApiProcess, worse: Path) -> None:
    change(running, "POST", "/experiment", challenger=version_of(worse))
    worker = JobWorker(running)
    try:
        table = "designation,description,productid\n" + "".join(f"{title},,{i}\n" for i, title in enumerate(TITLES))
        headers = running.token()
        job = running.client.post("/jobs", files={"file": ("a.csv", table)}, headers=headers).json()["id"]
        eventually(lambda: running.client.get(f"/jobs/{job}", headers=headers).json().get("status") == "succeeded", 60)
    finally: worker.stop()
    store = running.store()
    assert len(rows(store, shadow_predictions)) == len(TITLES)
    assert {r["request_id"] for r in rows(store, predictions)} == {f"{job}-{i + 1}" for i in range(len(TITLES))}
    store.close()

@services
def test_the_audit_sample_enters_review_whatever_the_confidence(own_api: ApiProcess, bundle: Path) -> None:
    save_bundle(replace(load_bundle(bundle), threshold=0.2), own_api.home / "bundle")
    own_api.env |= {"RAKUTEN_AUDIT_SHARE": "1", "RAKUTEN_UNREVIEWED_RETENTION_MINUTES": "0"}
    own_api.start()
    own_api.add_users(**ADMIN)
    versions(own_api)
    store = own_api.store()
    eventually(lambda: len(rows(store, predictions)) == len(TITLES))
    assert {r["audit"] for r in rows(store, predictions)} == {True}
    sure = [r for r in rows(store, predictions) if not r["needs_review"]]
    assert sure and {r["id"] for r in sure} <= {q.id for q in find_queued(store, limit=100)}
    store.close()

# --- promotion and rollback

def test_every_process_follows_a_promotion_and_a_rollback(
        running: ApiProcess, env: dict[str, str], tmp_path: Path, bundle: Path, twin: Path) -> None:
    shared = {"RAKUTEN_DATA_DIR": running.env["RAKUTEN_DATA_DIR"], "RAKUTEN_DATABASE_URL": running.database_url}
    with ApiProcess(env, tmp_path / "second", bundle, **shared) as second:
        change(running, "POST", "/experiment", challenger=version_of(twin))
        assert change(running, "POST", "/model/promote")["champion"] == version_of(twin)
        for api in (running, second):
            eventually(lambda api=api: api.client.get("/status").json()["model_version"] == version_of(twin))
            assert set(versions(api, TITLES[:3])) == {version_of(twin)}
        assert change(second, "POST", "/model/rollback")["champion"] == version_of(bundle)
        for api in (running, second):
            eventually(lambda api=api: api.client.get("/status").json()["model_version"] == version_of(bundle))

@services
def test_no_request_is_dropped_while_models_change(running: ApiProcess, twin: Path) -> None:
    headers, statuses = running.token(), []
    for route in ("/model/promote", "/model/rollback") * 3:
        body = {"reason": "again"} | ({"version": version_of(twin)} if route.endswith("promote") else {})
        assert running.client.post(route, json=body, headers=running.token("root")).status_code == 200
        statuses += [running.predict(headers, t).status_code for t in TITLES]
    assert set(statuses) == {200}

@services
def test_a_restart_serves_the_promoted_model_not_the_folder(running: ApiProcess, bundle: Path, twin: Path) -> None:
    change(running, "POST", "/model/promote", version=version_of(twin))
    running.stop()
    running.start()
    assert set(versions(running, TITLES[:3])) == {version_of(twin)} != {version_of(bundle)}

@services
def test_a_reload_adopts_the_bundle_of_the_folder_again(running: ApiProcess, bundle: Path, twin: Path) -> None:
    change(running, "POST", "/model/promote", version=version_of(twin))
    assert running.client.post("/model/reload", headers=running.token("root")).status_code == 202
    eventually(lambda: running.client.get("/status").json()["model_version"] == version_of(bundle))
    store = running.store()
    assert [d.action for d in list_deployments(store)] == ["adopt", "promote", "adopt"]
    store.close()

# --- failures

@services
def test_a_challenger_with_a_flipped_byte_leaves_the_champion(running: ApiProcess, bundle: Path, twin: Path) -> None:
    weights = running.home / "data/models" / version_of(twin) / "experts/text_linear/arrays.npz"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    started = change(running, "POST", "/experiment", challenger=version_of(twin), mode="canary", share=0.9)
    store = running.store()
    (report,) = find_deployment_reports(store, started["deployment"])
    assert (report["champion"], report["challenger"]) == (version_of(bundle), "")
    assert version_of(twin) in report["error"] and set(versions(running)) == {version_of(bundle)}
    assert running.client.get("/ready").status_code == 200
    store.close()

def test_what_contradicts_the_deployment_is_refused(running: ApiProcess, bundle: Path, twin: Path) -> None:
    root, send = running.token("root"), running.client.request
    cases: list[tuple[str, str, dict[str, Any], int, str]] = [
        ("POST", "/experiment", {"challenger": version_of(bundle)}, 409, "found the same"),
        ("POST", "/experiment", {"challenger": "0" * 12}, 422, "expected a model in the data directory"),
        ("POST", "/experiment", {"challenger": "../../etc"}, 422, "expected 12 hexadecimal digits"),
        ("POST", "/experiment", {"challenger": version_of(twin), "share": 2}, 422, "share: expected a number"),
        ("DELETE", "/experiment", {}, 409, "expected one that is running"),
        ("POST", "/model/rollback", {}, 409, "expected an earlier champion"),
        ("POST", "/model/promote", {}, 409, "found neither"),
        ("POST", "/model/promote", {"reason": " "}, 422, "reason: expected a text")]
    for method, route, body, status, text in cases:
        answer = send(method, route, json={"reason": "a test"} | body, headers=root)
        assert (answer.status_code, text in answer.json()["detail"]) == (status, True), answer.text
    for name in ("marie", "rene"):
        assert send("POST", "/model/rollback", json={"reason": "x"}, headers=running.token(name)).status_code == 403
    store = running.store()
    deployment = current_deployment(store)
    assert deployment and (deployment.action, deployment.champion) == ("adopt", version_of(bundle))
    store.close()

@services
def test_decisions_are_rows_and_lines_with_their_reason(running: ApiProcess, twin: Path) -> None:
    change(running, "POST", "/experiment", challenger=version_of(twin), reason="more data")
    change(running, "DELETE", "/experiment", reason="enough")
    store = running.store()
    assert [(d["outcome"], d["who"], d["reason"]) for d in rows(store, decisions)] == [
        ("start", "root", "more data"), ("stop", "root", "enough")]
    lines = [json.loads(line) for line in (running.home / "logs/decisions.log").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["start", "stop"]
    store.close()

# --- erasure

@services
def test_erasing_a_product_erases_the_answers_of_the_challenger(
        running: ApiProcess, worse: Path, rakuten: Callable[..., Any]) -> None:
    change(running, "POST", "/experiment", challenger=version_of(worse))
    versions(running)
    store = running.store()
    eventually(lambda: len(rows(store, shadow_predictions)) == len(TITLES))
    mine = {r["id"] for r in rows(store, predictions) if r["product_id"] == "3"}
    answer = rakuten("store", "erase", "--yes", "--product", "3", extra=running.env)
    assert answer.returncode == 0, answer.stderr
    left = {s["prediction"] for s in rows(store, shadow_predictions)}
    assert mine and not mine & left and len(left) == len(TITLES) - len(mine)
    answer = rakuten("store", "erase", "--yes", "--user", "marie", extra=running.env)
    assert answer.returncode == 0, answer.stderr
    for table in (predictions, shadow_predictions, retained_products, feedback): assert rows(store, table) == []
    store.close()
