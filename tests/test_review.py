"The review: uncertain products are queued, people label them, models train on the labels, and products expire."
import contextlib
import csv
import io
import resource
import shutil
import sqlite3
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from api_process import USERS, ApiProcess
from conftest import Run, needs_postgres, needs_redis
from hard_products import encoded
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from rakuten_nb.data.catalog import Catalog, make_products, read_catalog
from rakuten_nb.data.split import is_gold
from rakuten_nb.models.bundle import load_bundle, save_bundle
from rakuten_nb.taxonomy import CODES

STRANGE = "Zorblax quinvert à gradules, taille {}" # resembles no product of the sample, so that it needs review
OTHER = 2905 # a type that no prediction below has
T = TypeVar("T")
Json = dict[str, Any]
Header = dict[str, str]
DATABASES = ["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, needs_postgres, needs_redis])]

@pytest.fixture(scope="module", params=DATABASES)
def api(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path,
) -> Iterator[ApiProcess]:
    "A running API with an embedded worker, on each database."
    own = {"RAKUTEN_EMBEDDED_WORKER": "true"}
    if request.param == "postgresql":
        postgres, redis = (request.getfixturevalue(f"{name}_server") for name in ("postgres", "redis"))
        own |= {"RAKUTEN_DATABASE_URL": postgres.new_database(), "RAKUTEN_REDIS_URL": redis.url}
    with ApiProcess(env, tmp_path_factory.mktemp("review"), bundle, **own) as running:
        running.add_users(**USERS, paul="user")
        yield running

@pytest.fixture(scope="module")
def headers(api: ApiProcess) -> dict[str, Header]:
    "The header of each user."
    return {name: api.token(name) for name in (*USERS, "paul")}

@pytest.fixture(scope="module")
def picture(sample_catalog: Path) -> bytes:
    "A picture of the sample."
    return min((sample_catalog / "image_train").iterdir()).read_bytes()

def problem_detail(response: httpx.Response, status: int) -> str:
    "The detail of a problem document."
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json" and "\n" not in response.json()["detail"]
    return str(response.json()["detail"])

def predict(api: ApiProcess, header: Header, title: str, picture: bytes | None = None, **fields: str) -> Json:
    "The prediction of a product."
    response = api.predict(header, title, picture=picture, **fields)
    assert response.status_code == 200, response.text
    prediction: Json = response.json()
    return prediction

def send_label(api: ApiProcess, header: Header, code: object = OTHER, **product: object) -> httpx.Response:
    "Label a product."
    return api.client.post("/feedback", json={"prdtypecode": code, **product}, headers=header)

def review_page(api: ApiProcess, header: Header, **query: object) -> Json:
    "A page of the review queue."
    response = api.client.get("/review", params={"limit": 100, **query}, headers=header)
    assert response.status_code == 200, response.text
    page: Json = response.json()
    return page

def queued(api: ApiProcess, header: Header, **query: object) -> list[Json]:
    "The products of a page of the review queue."
    items: list[Json] = review_page(api, header, **query)["items"]
    return items

def request_ids(api: ApiProcess, header: Header, **query: object) -> list[str]:
    "The request ids of a page of the review queue."
    return [item["request_id"] for item in queued(api, header, **query)]

def wait_for(condition: Callable[[], T], seconds: float = 20) -> T:
    "Wait until a condition is true, and return its value."
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.05)
    return value

def wait_for_item(api: ApiProcess, header: Header, request_id: str) -> Json:
    "A product of the queue, which it enters within a second."
    def item() -> Json | None:
        return next((i for i in queued(api, header, order="latest") if i["request_id"] == request_id), None)
    return wait_for(item, 5)

# --- reading the queue

def test_an_uncertain_product_is_queued_with_title_picture_and_explanation(
    api: ApiProcess, headers: dict[str, Header], picture: bytes,
) -> None:
    title = STRANGE.format("<b>XL</b> & \"'")
    fields = {"description": "<p>en hêtre</p>", "product_id": "4711", "imageid": "12"}
    answer = predict(api, headers["marie"], title, picture, **fields)
    assert answer["needs_review"]
    item = wait_for_item(api, headers["rose"], answer["request_id"])
    sent = {"title": title, **fields, "user": "marie"}
    assert {name: item[name] for name in sent} == sent
    for name in ("predictions", "experts", "model_version"): assert item[name] == answer[name]
    shown = api.client.get(item["picture"], headers=headers["rose"])
    assert shown.content == picture and shown.headers["content-type"] == "image/jpeg"
    assert shown.headers["x-content-type-options"] == "nosniff"
    response = api.client.get(item["explanation"], headers=headers["rose"]).json()
    explanation = response["explanation"]
    assert response["model_version"] == answer["model_version"]
    assert explanation["prdtypecode"] == answer["predictions"][0]["label"] and explanation["pictures"]
    assert {w["text"] for w in explanation["words"]} & {"zorblax", "quinvert", "gradules"}
    titles = {user: [i["title"] for i in queued(api, headers["rose"], user=user)] for user in ("marie", "paul")}
    assert [title in titles[user] for user in ("marie", "paul")] == [True, False]

@pytest.fixture(scope="module")
def paged(api: ApiProcess, headers: dict[str, Header]) -> list[Json]:
    "The predictions of seven products of paul, which are in the queue."
    titles = [STRANGE.format(f"page {i}") + " piscine" * (i % 3) for i in range(7)]
    answers = [predict(api, headers["paul"], title, product_id=f"page-{i}") for i, title in enumerate(titles)]
    wait_for_item(api, headers["rose"], answers[-1]["request_id"])
    return answers

def test_the_queue_starts_with_the_least_certain_product(
    paged: list[Json], api: ApiProcess, headers: dict[str, Header],
) -> None:
    confidence = [item["predictions"][0]["confidence"] for item in queued(api, headers["rose"], user="paul")]
    assert len(confidence) >= 7 and confidence == sorted(confidence)

@pytest.mark.parametrize("order", ["doubt", "latest", "oldest"])
def test_pages_join_to_the_whole_queue(
    order: str, paged: list[Json], api: ApiProcess, headers: dict[str, Header],
) -> None:
    whole, seen, position = queued(api, headers["rose"], order=order), [], {}
    while True:
        page = review_page(api, headers["rose"], order=order, limit=3, **position)
        seen += [item["id"] for item in page["items"]]
        if page["next"] is None: break
        position = {"after": page["next"]}
        assert len(page["items"]) == 3
    assert seen == [item["id"] for item in whole] and len(set(seen)) == page["waiting"]

def test_the_queue_is_filtered_by_type_and_model(
    paged: list[Json], api: ApiProcess, headers: dict[str, Header],
) -> None:
    code = paged[0]["predictions"][0]["label"]
    items = queued(api, headers["rose"], prdtypecode=code)
    assert {item["predictions"][0]["label"] for item in items} == {code}
    assert queued(api, headers["rose"], model_version="another") == []

def test_a_product_that_is_sent_twice_is_queued_once(
    paged: list[Json], api: ApiProcess, headers: dict[str, Header],
) -> None:
    again = predict(api, headers["marie"], STRANGE.format("page 0"))
    assert wait_for_item(api, headers["rose"], again["request_id"])["user"] == "marie"
    same = [item for item in queued(api, headers["rose"]) if item["title"] == STRANGE.format("page 0")]
    assert [item["request_id"] for item in same] == [again["request_id"]]

QUERIES = ["limit=0", "limit=101", "limit=x", "limit=1&limit=2", "order=best", "prdtypecode=11", "prdtypecode=",
           "after=-1", "user=", "user=%00", "after=999999999", "foo=1"]

@pytest.mark.parametrize("query", QUERIES)
def test_an_invalid_query_is_a_problem_document(query: str, api: ApiProcess, headers: dict[str, Header]) -> None:
    detail = problem_detail(api.client.get(f"/review?{query}", headers=headers["rose"]), 422)
    assert detail.strip("'").startswith(query.split("=")[0])

@pytest.mark.parametrize("id", ["0", "999999999", "1e3", "-1", "..%2F..%2Fetc", "9" * 30, "é", "%00"])
def test_an_unknown_product_is_not_found(id: str, api: ApiProcess, headers: dict[str, Header]) -> None:
    for part in ("picture", "explanation"):
        problem_detail(api.client.get(f"/review/{id}/{part}", headers=headers["rose"]), 404)

# --- labelling

@pytest.fixture
def item(api: ApiProcess, headers: dict[str, Header], picture: bytes) -> Json:
    "A product of marie in the queue, not labelled; the product is new in each test."
    answer = predict(api, headers["marie"], STRANGE.format(f"rights {time.monotonic_ns()}"), picture)
    return wait_for_item(api, headers["rose"], answer["request_id"])

def test_the_queue_is_read_with_the_scope_review_only(
    item: Json, api: ApiProcess, headers: dict[str, Header],
) -> None:
    for path in ("/review", item["picture"], item["explanation"]):
        problem_detail(api.client.get(path), 401)
        problem_detail(api.client.get(path, headers=headers["marie"]), 403)
        problem_detail(api.client.get(path, headers=api.token("rose", scope="predict feedback")), 403)
        assert api.client.get(path, headers=headers["root"]).status_code == 200

def test_a_users_label_does_not_end_the_review_and_a_reviewers_does(
    item: Json, api: ApiProcess, headers: dict[str, Header],
) -> None:
    product = {"request_id": item["request_id"]}
    problem_detail(send_label(api, {}, **product), 401)
    problem_detail(send_label(api, api.token("marie", scope="predict"), **product), 403)
    assert "not yours" in problem_detail(send_label(api, headers["paul"], **product), 404), "as if it did not exist"
    by_user = send_label(api, headers["marie"], **product)
    assert by_user.status_code == 201 and by_user.json()["reviewed"] is False and by_user.json()["kept"] is True
    assert wait_for_item(api, headers["rose"], item["request_id"])["said"] == [OTHER], "it is still in the queue"
    by_reviewer = send_label(api, headers["rose"], 10, **product)
    assert by_reviewer.status_code == 201 and by_reviewer.json() | {"at": ""} == {
        "request_id": item["request_id"], "product_id": "", "prdtypecode": 10, "name": by_reviewer.json()["name"],
        "at": "", "user": "rose", "predicted": item["predictions"][0]["label"], "reviewed": True, "kept": True}
    assert item["request_id"] not in request_ids(api, headers["rose"])
    problem_detail(api.client.get(item["picture"], headers=headers["rose"]), 404)

def test_a_label_is_given_once_and_may_be_deleted(api: ApiProcess, headers: dict[str, Header]) -> None:
    answer = predict(api, headers["marie"], STRANGE.format("once"))
    product, address = {"request_id": answer["request_id"]}, f"/feedback/{answer['request_id']}"
    first, again = (send_label(api, headers["rose"], 60, **product) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200) and first.json() == again.json()
    assert "you said 60" in problem_detail(send_label(api, headers["rose"], 40, **product), 409)
    assert api.client.delete(address, headers=headers["rose"]).status_code == 204
    problem_detail(api.client.delete(address, headers=headers["rose"]), 404)
    problem_detail(api.client.delete(address, headers=headers["paul"]), 404)
    assert wait_for_item(api, headers["rose"], answer["request_id"]), "without its label it is queued again"
    assert send_label(api, headers["rose"], 40, **product).status_code == 201

def test_a_request_id_of_several_requests_is_ambiguous(api: ApiProcess, headers: dict[str, Header]) -> None:
    rose, paul = headers["rose"], headers["paul"]
    titles = {name: STRANGE.format(f"same id by {name}") for name in ("marie", "paul")}
    for name, title in titles.items():
        sent = headers[name] | {"X-Request-ID": "alike"}
        response = api.client.post("/predict", data={"designation": title}, headers=sent)
        assert response.json()["request_id"] == "alike"
    def find(title: str) -> Json | None: return next((i for i in queued(api, rose) if i["title"] == title), None)
    items = {name: wait_for(lambda t=title: find(t)) for name, title in titles.items()}
    remaining = lambda: [i["title"] for i in queued(api, rose) if i["request_id"] == "alike"]
    assert "`id`" in problem_detail(send_label(api, rose, 10, request_id="alike"), 409)
    assert send_label(api, rose, 10, id=items["marie"]["id"]).status_code == 201
    assert remaining() == [titles["paul"]], "the number of the prediction is unique"
    assert send_label(api, paul, 40, request_id="alike").json()["predicted"] == items["paul"]["predictions"][0]["label"]
    problem_detail(send_label(api, paul, 40, id=items["marie"]["id"]), 404)
    assert api.client.delete("/feedback/alike", headers=rose).status_code == 204, "rose has labelled one of the two"
    assert set(remaining()) == set(titles.values())

def test_a_request_cannot_use_the_id_of_a_job_row(api: ApiProcess, headers: dict[str, Header]) -> None:
    row_id = f"{'a' * 32}-1"
    sent = headers["paul"] | {"X-Request-ID": row_id}
    response = api.client.post("/predict", data={"designation": "Jeu"}, headers=sent)
    assert response.json()["request_id"] != row_id

def test_a_certain_prediction_is_queued_if_a_user_contradicts_it(own_api: ApiProcess, picture: bytes) -> None:
    folder = Path(own_api.env["RAKUTEN_BUNDLE"])
    save_bundle(replace(load_bundle(folder), threshold=0.0), folder)
    own_api.start().add_users(**USERS)
    marie, rose = own_api.token("marie"), own_api.token("rose")
    first, latest = (predict(own_api, marie, STRANGE.format("sure"), picture, product_id="sure") for _ in range(2))
    assert not latest["needs_review"]
    response = send_label(own_api, marie, OTHER, product_id="sure")
    assert response.status_code == 201
    assert response.json()["request_id"] == latest["request_id"] != first["request_id"], "the latest prediction"
    item = wait_for_item(own_api, rose, latest["request_id"])
    assert response.json()["kept"] and item["said"] == [OTHER]
    assert own_api.client.get(item["picture"], headers=rose).content == picture
    agreed = predict(own_api, marie, STRANGE.format("agreed"))
    code, product = agreed["predictions"][0]["label"], {"request_id": agreed["request_id"]}
    assert send_label(own_api, marie, code, **product).status_code == 201
    assert request_ids(own_api, rose) == [latest["request_id"]], "a confirmed prediction needs no review"

JSON_BODY = {"Content-Type": "application/json"}
DUPLICATE = b'{"prdtypecode": 10, "prdtypecode": 40}'
BODIES: dict[str, tuple[int, str, Json]] = { # status, word of the detail, options of the request
    "no type": (422, "prdtypecode", {"json": {"request_id": "x"}}),
    "an unknown type": (422, "prdtypecode", {"json": {"request_id": "x", "prdtypecode": 11}}),
    "a type in words": (422, "prdtypecode", {"json": {"request_id": "x", "prdtypecode": "livre"}}),
    "neither id": (422, "request_id, product_id", {"json": {"prdtypecode": 10}}),
    "both ids": (422, "request_id, product_id", {"json": {"request_id": "x", "product_id": "y", "prdtypecode": 10}}),
    "an unknown field": (422, "reviewer", {"json": {"request_id": "x", "prdtypecode": 10, "reviewer": True}}),
    "a field twice": (422, "twice", {"content": DUPLICATE, "headers": JSON_BODY}),
    "invalid JSON": (400, "JSON", {"content": b"{", "headers": JSON_BODY}),
    "a list": (400, "JSON", {"json": [10]}),
    "deeply nested": (400, "JSON", {"content": b"[" * 4000, "headers": JSON_BODY}),
    "XML": (415, "Content-Type", {"content": b"<x/>", "headers": {"Content-Type": "text/xml"}}),
    "too large": (413, "4,096", {"json": {"request_id": "x" * 5000}}),
    "an unknown request": (404, "request_id", {"json": {"request_id": "x", "prdtypecode": 10}}),
    "a form": (404, "product_id", {"data": {"product_id": "unknown", "prdtypecode": "10"}}),
}

@pytest.mark.parametrize("case", BODIES)
def test_invalid_feedback_is_a_problem_document(case: str, api: ApiProcess, headers: dict[str, Header]) -> None:
    status, word, options = BODIES[case]
    sent = options | {"headers": options.get("headers", {}) | headers["rose"]}
    assert word in problem_detail(api.client.post("/feedback", **sent), status)

# --- live accuracy

def live_accuracy(api: ApiProcess, header: Header, version: str) -> dict[str, Json]: # kind of prediction → figures
    "How often a model was right according to the labels."
    rows = api.client.get("/model", headers=header).json()["live"]
    return {row["answers"]: row for row in rows if row["model_version"] == version}

def exposed_metrics(api: ApiProcess, version: str) -> dict[str, float]:
    "Metrics about feedback and review of a model, for predictions that need review."
    families = text_string_to_metric_families(api.client.get("/metrics").text)
    labels = ({"model_version": version, "answers": "doubtful"}, {})
    names = ("rakuten_feedback", "rakuten_live", "rakuten_review")
    return {s.name: s.value for f in families for s in f.samples if s.labels in labels and s.name.startswith(names)}

def test_labels_change_the_live_accuracy_of_the_model(api: ApiProcess, headers: dict[str, Header]) -> None:
    answer = predict(api, headers["marie"], STRANGE.format("live"))
    version, product = answer["model_version"], {"request_id": answer["request_id"]}
    before = live_accuracy(api, headers["marie"], version).get("doubtful", {"n": 0, "right": 0})
    send_label(api, headers["marie"], OTHER, **product)
    send_label(api, headers["rose"], right := answer["predictions"][0]["label"], **product)
    after = live_accuracy(api, headers["marie"], version)["doubtful"]
    assert right != OTHER
    assert (after["n"], after["right"]) == (before["n"] + 1, before["right"] + 1), "the reviewer's label counts"
    assert after["low"] < after["accuracy"] == after["right"] / after["n"] <= after["high"] + 1e-12
    expected = {
        "rakuten_feedback_predictions": after["n"], "rakuten_live_accuracy": after["accuracy"],
        "rakuten_live_accuracy_low": after["low"], "rakuten_live_accuracy_high": after["high"],
        "rakuten_review_waiting": review_page(api, headers["rose"])["waiting"]}
    close = {name: pytest.approx(value) for name, value in expected.items()}
    def metrics() -> dict[str, float | None]:
        exposed = exposed_metrics(api, version)
        return {name: exposed.get(name) for name in expected}
    wait_for(lambda: metrics() == close, 10)

# --- the rows of a job

def run_job(api: ApiProcess, header: Header, archive: bytes) -> tuple[str, list[dict[str, str]]]: # id, predictions
    "Send an archive as a job and wait for its predictions."
    job = api.client.post("/jobs", files={"file": ("x.zip", archive)}, headers=header).json()["id"]
    wait_for(lambda: api.client.get(f"/jobs/{job}", headers=header).json()["status"] == "succeeded")
    text = api.client.get(f"/jobs/{job}/predictions.csv", headers=header).text
    return job, list(csv.DictReader(io.StringIO(text)))

def test_uncertain_rows_of_a_job_are_queued_with_their_pictures(
    api: ApiProcess, headers: dict[str, Header], picture: bytes,
) -> None:
    titles = [STRANGE.format(f"lot {i}") for i in range(3)]
    titles[2] += "\0" # PostgreSQL stores no text with this character
    rows = "".join(f"\"{title}\",,{100 + i},{200 + i}\n" for i, title in enumerate(titles))
    with zipfile.ZipFile(archive := io.BytesIO(), "w") as z:
        z.writestr("x.csv", f"designation,description,productid,imageid\n{rows},,7,7\n")
        z.writestr("image_201_product_101.jpg", picture)
    job, lines = run_job(api, headers["paul"], archive.getvalue())
    needs_review = [line["needs_review"] == "true" and bool(line["prdtypecode"]) for line in lines]
    uncertain = [f"{job}-{i + 1}" for i, needed in enumerate(needs_review) if needed]
    page = queued(api, headers["rose"], user="paul", order="latest")
    items = {item["request_id"]: item for item in page if item["request_id"].startswith(job)}
    assert list(items)[::-1] == uncertain and len(uncertain) >= 2
    assert f"{job}-4" not in items, "a row without a prediction is not reviewed"
    item = items[f"{job}-2"]
    assert (item["product_id"], item["imageid"], item["title"]) == ("101", "201", titles[1])
    assert api.client.get(item["picture"], headers=headers["rose"]).content == picture
    assert send_label(api, headers["paul"], OTHER, request_id=f"{job}-1").status_code == 201
    assert send_label(api, headers["rose"], OTHER, request_id=f"{job}-2").status_code == 201

# --- retention

@pytest.fixture(scope="module")
def run_cli(rakuten: Run) -> Run:
    "Runs the command line with the settings of a running API."
    def run(api: ApiProcess, *args: object) -> subprocess.CompletedProcess[str]:
        return rakuten(*args, extra=api.env | {"COLUMNS": "200"})
    return run

def test_the_command_line_erases_products_and_requests(
    api: ApiProcess, headers: dict[str, Header], run_cli: Run,
) -> None:
    picture = encoded(Image.linear_gradient("L").convert("RGB").resize((90, 70)), "PNG")
    first = predict(api, headers["marie"], STRANGE.format("to be erased"), picture, product_id="forget-1")
    second = predict(api, headers["marie"], STRANGE.format("without an id"))
    wait_for_item(api, headers["rose"], second["request_id"])
    folder = api.home / "data/kept"
    pictures = lambda: [p for p in folder.glob("??/*") if p.read_bytes() == picture]
    assert len(pictures()) == 1 and folder.stat().st_mode & 0o77 == 0
    erased = run_cli(api, "store", "erase", "--product", "forget-1", "--yes")
    assert erased.returncode == 0, erased.stderr
    assert "1 predictions, 1 products, 0 feedback, 1 pictures" in erased.stdout and not pictures()
    assert run_cli(api, "store", "erase", "--request", second["request_id"], "--yes").returncode == 0
    assert not set(request_ids(api, headers["rose"])) & {first["request_id"], second["request_id"]}
    problem_detail(send_label(api, headers["marie"], OTHER, request_id=first["request_id"]), 404)
    again = run_cli(api, "store", "erase", "--product", "forget-1", "--yes")
    assert again.returncode == 2
    assert again.stderr.strip() == "error: product forget-1: not found in the store, nor in any job"

@pytest.mark.services
def test_an_erased_user_loses_access_and_the_name_is_free_again(
    api: ApiProcess, headers: dict[str, Header], run_cli: Run,
) -> None:
    api.add_users(leaver="user")
    leaver = api.token("leaver")
    prediction = predict(api, leaver, STRANGE.format("of a user who leaves"))
    wait_for_item(api, headers["rose"], prediction["request_id"])
    assert run_cli(api, "store", "erase", "--user", "leaver", "--yes").returncode == 0
    assert prediction["request_id"] not in request_ids(api, headers["rose"])
    time.sleep(1.1) # tokens are dated in whole seconds: one of this second would still be accepted
    api.add_users(leaver="reviewer") # another user of the same name
    wait_for(lambda: api.client.get("/model", headers=leaver).status_code == 401)
    assert api.client.get("/review", headers=api.token("leaver")).status_code == 200

def test_the_command_line_shows_what_is_retained(api: ApiProcess, run_cli: Run) -> None:
    shown = run_cli(api, "store", "show")
    assert shown.returncode == 0 and "products for review or learning" in shown.stdout and "90 days" in shown.stdout

def test_without_retention_no_product_is_stored_or_queued(
    env: dict[str, str], tmp_path: Path, bundle: Path, picture: bytes,
) -> None:
    with ApiProcess(env, tmp_path / "api", bundle, RAKUTEN_KEEP_DAYS="0") as api:
        api.add_users(**USERS)
        rose, data = api.token("rose"), api.home / "data"
        answer = predict(api, api.token("marie"), STRANGE.format("not retained"), picture)
        response = send_label(api, rose, 10, request_id=answer["request_id"])
        assert response.status_code == 201 and response.json()["kept"] is False, "live accuracy counts the label"
        assert review_page(api, rose) == {"waiting": 0, "items": [], "next": None}
        assert not list(data.glob("kept/*/*"))
        api.stop()
        with contextlib.closing(sqlite3.connect(data / "rakuten.sqlite")) as c: dump = "\n".join(c.iterdump())
        assert "Zorblax" not in dump and answer["request_id"] in dump
        files = [p for p in data.rglob("*") if p.is_file() and "models" not in p.parts]
        assert b"Zorblax" not in b"".join(p.read_bytes() for p in files)
        assert "zorblax" not in api.log().lower(), "the log contains no text of a merchant"

@pytest.mark.parametrize("full", [False, True], ids=["no folder", "full disk"])
def test_predicts_if_a_picture_cannot_be_stored(
    full: bool, env: dict[str, str], tmp_path: Path, bundle: Path,
) -> None:
    (tmp_path / "api/data").mkdir(parents=True)
    if not full: (tmp_path / "api/data/kept").write_text("a file instead of a folder")
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    large = encoded(Image.fromarray(noise), "PNG") # 2.4 MB
    with ApiProcess(env, tmp_path / "api", bundle) as api:
        api.add_users(**USERS)
        marie, rose = api.token("marie"), api.token("rose")
        assert api.process
        limits = (2**21, resource.RLIM_INFINITY) # bytes a file
        if full: resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, limits)
        answer = predict(api, marie, STRANGE.format("no space"), large)
        wait_for(lambda: "rakuten_products_not_retained_total 1.0" in api.client.get("/metrics").text)
        assert send_label(api, rose, 10, request_id=answer["request_id"]).json()["kept"] is False
        assert "a product could not be retained" in api.log()
        assert "Zorblax" not in api.log() and "Traceback" not in api.terminal()
        later = predict(api, marie, STRANGE.format("without a picture"))
        item = wait_for_item(api, rose, later["request_id"])
        assert item["title"] == STRANGE.format("without a picture"), "a later product is retained"

# --- from an uncertain prediction to a model that was trained on its label

def holdout_texts(catalog: Catalog) -> tuple[list[str], str]: # titles, description
    "The title of a holdout product and one that differs by a repeated word and is no holdout product."
    products = catalog.train
    row = next(i for i in is_gold(products).nonzero()[0] if len(str(products.title[i]).split()) > 5)
    title, description = str(products.title[row]), str(products.description[row])
    longer = [f"{title} {word}" for word in title.split()]
    near = next(t for t in longer if not is_gold(make_products([t], [description]))[0])
    return [title, near], description

def check_export(out: Path, onto: Path, title: str, truth: int, picture: bytes) -> None:
    "The catalogue has one new labelled product, the old labels, and the reasons of the two that were left out."
    new, old = read_catalog(out).labelled, read_catalog(onto).labelled
    assert len(new) == len(old) + 1 and new.title[-1] == title and CODES[new.label[-1]] == truth
    assert new.productid[-1] == "31415926" and new.picture[-1].read_bytes() == picture
    assert (new.label[:-1] == old.label).all(), "the holdout retains its labels"
    with (out / "left_out.csv").open(encoding="utf-8") as f: reasons = [line["reason"] for line in csv.DictReader(f)]
    assert sorted(reasons) == ["gold: models are evaluated on it", "near duplicate of a gold product"]

@pytest.mark.services
@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def test_the_next_model_learns_from_a_label(
    database: str, request: pytest.FixtureRequest, own_api: ApiProcess, sample_catalog: Path, rakuten: Run,
    run_cli: Run, tmp_path: Path, picture: bytes,
) -> None:
    if database == "postgresql": own_api.env["RAKUTEN_DATABASE_URL"] = request.getfixturevalue("postgres")
    api = own_api.start()
    api.add_users(**USERS)
    marie, rose, root = (api.token(name) for name in USERS)
    # The first model predicts a wrong type and is uncertain.
    title, product = STRANGE.format("unique en son genre, quinvert de gradules"), {"product_id": "31415926"}
    first = predict(api, marie, title, picture, **product)
    wrong, version = first["predictions"][0]["label"], first["model_version"]
    truth = next(code for code in reversed(CODES) if code not in [p["label"] for p in first["predictions"]])
    assert first["needs_review"]
    # A reviewer sees the product and labels it.
    item = wait_for_item(api, rose, first["request_id"])
    assert item["title"] == title and api.client.get(item["picture"], headers=rose).content == picture
    assert send_label(api, rose, truth, request_id=first["request_id"]).status_code == 201
    assert review_page(api, rose)["waiting"] == 0 and live_accuracy(api, root, version)["reviewed"]["right"] == 0
    # A holdout product and a near duplicate of it are labelled too; models must not train on them.
    titles, description = holdout_texts(read_catalog(sample_catalog))
    for holdout_title in titles:
        near = predict(api, marie, holdout_title, description=description)
        assert send_label(api, rose, truth, request_id=near["request_id"]).status_code == 201
    # The labels are exported, and the next model trains on them.
    out, served = tmp_path / "reviewed", Path(api.env["RAKUTEN_BUNDLE"])
    exported = run_cli(api, "feedback", "export", out, "--onto", sample_catalog)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    check_export(out, sample_catalog, title, truth, picture)
    trained = rakuten("train", out, "--bundle", tmp_path / "bundle", "--experts", "text_linear")
    assert trained.returncode == 0, trained.stderr
    # The API loads the next model, which predicts the right type and has no labels of its own yet.
    shutil.rmtree(served)
    shutil.copytree(tmp_path / "bundle", served)
    assert api.client.post("/model/reload", headers=root).status_code == 202
    wait_for(lambda: api.client.get("/status").json()["model_version"] != version, 30)
    second = predict(api, marie, title, picture, **product)
    assert second["predictions"][0]["label"] == truth != wrong and second["model_version"] != version
    earlier = next((p["confidence"] for p in first["predictions"] if p["label"] == truth), 0)
    assert second["predictions"][0]["confidence"] > earlier
    time.sleep(1.2) # the prediction log writes within this time
    assert review_page(api, rose)["waiting"] == 0, "a reviewed product is not queued again, whatever the confidence"
    assert live_accuracy(api, root, version)["reviewed"]["n"] == 3
    assert not live_accuracy(api, root, second["model_version"])
