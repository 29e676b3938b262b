"The review: doubtful products wait, people say what they are, models learn from it; and what is kept is forgotten in time."
import contextlib
import csv
import io
import resource
import shutil
import sqlite3
import subprocess
import sys
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

from rakuten_nb.data.catalog import make_products, read_catalog
from rakuten_nb.data.split import is_gold
from rakuten_nb.models.bundle import load_bundle, save_bundle
from rakuten_nb.taxonomy import CODES

STRANGE = "Zorblax quinvert à gradules, taille {}" # nothing like it is in the sample, so that every answer is doubtful
T = TypeVar("T")
OTHER = 2905 # a type that no answer below has by itself

@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, needs_postgres, needs_redis])])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API with a worker inside, on either database."
    own = {"RAKUTEN_EMBEDDED_WORKER": "true"}
    if request.param == "postgresql":
        postgres, redis = (request.getfixturevalue(f"{name}_server") for name in ("postgres", "redis"))
        own |= {"RAKUTEN_DATABASE_URL": postgres.new_database(), "RAKUTEN_REDIS_URL": redis.url}
    with ApiProcess(env, tmp_path_factory.mktemp("review"), bundle, **own) as running:
        running.add_users(**USERS, paul="user")
        yield running

@pytest.fixture(scope="module")
def who(api: ApiProcess) -> dict[str, dict[str, str]]:
    "Everybody's header."
    return {name: api.token(name) for name in (*USERS, "paul")}

@pytest.fixture(scope="module")
def picture(sample_catalog: Path) -> bytes:
    "A picture of the sample."
    return min((sample_catalog / "image_train").iterdir()).read_bytes()

def problem(answer: httpx.Response, status: int) -> str:
    "The detail of an answer that says no."
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and "\n" not in answer.json()["detail"]
    return str(answer.json()["detail"])

def asked(api: ApiProcess, header: dict[str, str], title: str, picture: bytes | None = None, **fields: str) -> dict[str, Any]:
    "An answer."
    answer = api.predict(header, title, picture=picture, **fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found

def say(api: ApiProcess, header: dict[str, str], code: object = OTHER, **about: object) -> httpx.Response:
    "Say what a product is."
    return api.client.post("/feedback", json={"prdtypecode": code, **about}, headers=header)

def queue(api: ApiProcess, header: dict[str, str], **query: object) -> dict[str, Any]:
    "A page of what waits."
    answer = api.client.get("/review", params={"limit": 100, **query}, headers=header)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found

def until(what: Callable[[], T], within: float = 20) -> T:
    "Wait for something."
    deadline = time.monotonic() + within
    while not (found := what()):
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)
    return found

def waits(api: ApiProcess, header: dict[str, str], request_id: str) -> dict[str, Any]:
    "A product in the queue, where it comes to be within a second."
    return until(lambda: next((item for item in queue(api, header, order="latest")["items"] if item["request_id"] == request_id), None), 5)

# --- looking

def test_a_doubtful_product_waits_with_title_picture_and_explanation(api: ApiProcess, who: dict[str, dict[str, str]], picture: bytes) -> None:
    title = STRANGE.format("<b>XL</b> & \"'")
    answer = asked(api, who["marie"], title, picture, description="<p>en hêtre</p>", product_id="4711", imageid="12")
    assert answer["needs_review"]
    item = waits(api, who["rose"], answer["request_id"])
    assert (item["title"], item["description"], item["product_id"], item["imageid"], item["user"]) == (title, "<p>en hêtre</p>", "4711", "12", "marie")
    assert item["predictions"] == answer["predictions"] and item["experts"] == answer["experts"] and item["model_version"] == answer["model_version"]
    shown = api.client.get(item["picture"], headers=who["rose"])
    assert shown.content == picture and shown.headers["content-type"] == "image/jpeg" and shown.headers["x-content-type-options"] == "nosniff"
    why = api.client.get(item["explanation"], headers=who["rose"]).json()
    assert why["model_version"] == answer["model_version"] and why["explanation"]["prdtypecode"] == answer["predictions"][0]["label"]
    assert {w["text"] for w in why["explanation"]["words"]} & {"zorblax", "quinvert", "gradules"} and why["explanation"]["pictures"]
    assert [title in [i["title"] for i in queue(api, who["rose"], user=name)["items"]] for name in ("marie", "paul")] == [True, False]

def test_the_queue_is_ordered_filtered_and_read_page_by_page(api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    answers = [asked(api, who["paul"], STRANGE.format(f"page {i}") + " piscine" * (i % 3), product_id=f"page-{i}") for i in range(7)]
    waits(api, who["rose"], answers[-1]["request_id"])
    mine = queue(api, who["rose"], user="paul")
    sureness = [item["predictions"][0]["confidence"] for item in mine["items"]]
    assert len(sureness) >= 7 and sureness == sorted(sureness), "the most doubtful first"
    for order in ("doubt", "latest", "oldest"):
        whole, seen, after = queue(api, who["rose"], order=order)["items"], [], None
        while True:
            page = queue(api, who["rose"], order=order, limit=3, **({} if after is None else {"after": after}))
            seen += [item["id"] for item in page["items"]]
            if (after := page["next"]) is None: break
            assert len(page["items"]) == 3
        assert seen == [item["id"] for item in whole] and len(set(seen)) == page["waiting"]
    code = answers[0]["predictions"][0]["label"]
    assert {item["predictions"][0]["label"] for item in queue(api, who["rose"], prdtypecode=code)["items"]} == {code}
    assert queue(api, who["rose"], model_version="another")["items"] == []
    again = asked(api, who["marie"], STRANGE.format("page 0"))
    assert waits(api, who["rose"], again["request_id"])["user"] == "marie"
    same = [item for item in queue(api, who["rose"])["items"] if item["title"] == STRANGE.format("page 0")]
    assert [item["request_id"] for item in same] == [again["request_id"]], "sent twice, it waits once"

QUERIES = ["limit=0", "limit=101", "limit=x", "limit=1&limit=2", "order=best", "prdtypecode=11", "prdtypecode=", "after=-1", "user=", "user=%00",
           "after=999999999", "foo=1"]

@pytest.mark.parametrize("query", QUERIES)
def test_a_bad_question_is_a_problem_document(query: str, api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    assert problem(api.client.get(f"/review?{query}", headers=who["rose"]), 422).strip("'").startswith(query.split("=")[0])

@pytest.mark.parametrize("id", ["0", "999999999", "1e3", "-1", "..%2F..%2Fetc", "9" * 30, "é", "%00"])
def test_there_is_no_other_product(id: str, api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    for part in ("picture", "explanation"): problem(api.client.get(f"/review/{id}/{part}", headers=who["rose"]), 404)

# --- saying

def test_who_may_look_and_who_may_say(api: ApiProcess, who: dict[str, dict[str, str]], picture: bytes) -> None:
    answer = asked(api, who["marie"], STRANGE.format("rights"), picture)
    item = waits(api, who["rose"], answer["request_id"])
    about = {"request_id": answer["request_id"]}
    for path in ("/review", item["picture"], item["explanation"]):
        problem(api.client.get(path), 401)
        problem(api.client.get(path, headers=who["marie"]), 403)
        problem(api.client.get(path, headers=api.token("rose", scope="predict feedback")), 403)
        assert api.client.get(path, headers=who["root"]).status_code == 200
    problem(say(api, {}, **about), 401)
    problem(say(api, api.token("marie", scope="predict"), **about), 403)
    assert "not yours" in problem(say(api, who["paul"], **about), 404), "other people's are as unknown as those that never were"
    said = say(api, who["marie"], **about)
    assert said.status_code == 201 and said.json()["reviewed"] is False and said.json()["kept"] is True
    assert waits(api, who["rose"], answer["request_id"])["said"] == [OTHER], "a user's word does not end the review"
    done = say(api, who["rose"], 10, **about)
    assert done.status_code == 201 and done.json() | {"at": ""} == {
        "request_id": answer["request_id"], "product_id": "", "prdtypecode": 10, "name": done.json()["name"], "at": "", "user": "rose",
        "predicted": answer["predictions"][0]["label"], "reviewed": True, "kept": True}
    assert answer["request_id"] not in [i["request_id"] for i in queue(api, who["rose"])["items"]]
    problem(api.client.get(item["picture"], headers=who["rose"]), 404)

def test_a_word_is_said_once_and_may_be_taken_back(api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    answer = asked(api, who["marie"], STRANGE.format("once"))
    about, place = {"request_id": answer["request_id"]}, f"/feedback/{answer['request_id']}"
    first, again = say(api, who["rose"], 60, **about), say(api, who["rose"], 60, **about)
    assert (first.status_code, again.status_code) == (201, 200) and first.json() == again.json()
    assert "you said 60" in problem(say(api, who["rose"], 40, **about), 409)
    assert api.client.delete(place, headers=who["rose"]).status_code == 204
    problem(api.client.delete(place, headers=who["rose"]), 404)
    problem(api.client.delete(place, headers=who["paul"]), 404)
    assert waits(api, who["rose"], answer["request_id"]), "what was taken back waits again"
    assert say(api, who["rose"], 40, **about).status_code == 201

def test_a_name_that_several_requests_have_is_not_guessed_at(api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    titles = {name: STRANGE.format(f"named alike by {name}") for name in ("marie", "paul")}
    for name, title in titles.items():
        answer = api.client.post("/predict", data={"designation": title}, headers=who[name] | {"X-Request-ID": "alike"})
        assert answer.json()["request_id"] == "alike"
    items = {name: until(lambda t=title: next((i for i in queue(api, who["rose"])["items"] if i["title"] == t), None)) for name, title in titles.items()}
    assert "`id`" in problem(say(api, who["rose"], 10, request_id="alike"), 409)
    assert say(api, who["rose"], 10, id=items["marie"]["id"]).status_code == 201
    assert [i["title"] for i in queue(api, who["rose"])["items"] if i["request_id"] == "alike"] == [titles["paul"]], "the one that was meant"
    assert say(api, who["paul"], 40, request_id="alike").json()["predicted"] == items["paul"]["predictions"][0]["label"]
    problem(say(api, who["paul"], 40, id=items["marie"]["id"]), 404)
    assert api.client.delete("/feedback/alike", headers=who["rose"]).status_code == 204, "what was said is known, whatever the name"
    assert {i["title"] for i in queue(api, who["rose"])["items"] if i["request_id"] == "alike"} == set(titles.values())
    row = api.client.post("/predict", data={"designation": "Jeu"}, headers=who["paul"] | {"X-Request-ID": f"{'a' * 32}-1"})
    assert row.json()["request_id"] != f"{'a' * 32}-1", "nobody calls a request like a row of a job"

def test_a_sure_answer_may_be_disputed_while_its_product_is_there(own_api: ApiProcess, picture: bytes) -> None:
    place = Path(own_api.env["RAKUTEN_BUNDLE"])
    save_bundle(replace(load_bundle(place), threshold=0.0), place)
    own_api.start().add_users(**USERS)
    marie, rose = own_api.token("marie"), own_api.token("rose")
    older, sure = (asked(own_api, marie, STRANGE.format("sure"), picture, product_id="sure") for _ in range(2))
    assert not sure["needs_review"]
    said = say(own_api, marie, OTHER, product_id="sure")
    assert said.status_code == 201 and said.json()["request_id"] == sure["request_id"] != older["request_id"], "the latest answer about that product"
    item = waits(own_api, rose, sure["request_id"])
    assert said.json()["kept"] and item["said"] == [OTHER] and own_api.client.get(item["picture"], headers=rose).content == picture
    agreed = asked(own_api, marie, STRANGE.format("agreed"))
    assert say(own_api, marie, agreed["predictions"][0]["label"], request_id=agreed["request_id"]).status_code == 201
    assert [i["request_id"] for i in queue(own_api, rose)["items"]] == [sure["request_id"]], "whom nobody contradicts need not wait"

BODIES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "no type": (422, "prdtypecode", {"json": {"request_id": "x"}}),
    "an unknown type": (422, "prdtypecode", {"json": {"request_id": "x", "prdtypecode": 11}}),
    "a type in words": (422, "prdtypecode", {"json": {"request_id": "x", "prdtypecode": "livre"}}),
    "neither id": (422, "request_id, product_id", {"json": {"prdtypecode": 10}}),
    "both ids": (422, "request_id, product_id", {"json": {"request_id": "x", "product_id": "y", "prdtypecode": 10}}),
    "a field of ours": (422, "reviewer", {"json": {"request_id": "x", "prdtypecode": 10, "reviewer": True}}),
    "a field twice": (422, "twice", {"content": b'{"prdtypecode": 10, "prdtypecode": 40}', "headers": {"Content-Type": "application/json"}}),
    "no JSON": (400, "JSON", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
    "a list": (400, "JSON", {"json": [10]}),
    "deep": (400, "JSON", {"content": b"[" * 4000, "headers": {"Content-Type": "application/json"}}),
    "XML": (415, "Content-Type", {"content": b"<x/>", "headers": {"Content-Type": "text/xml"}}),
    "too large": (413, "4,096", {"json": {"request_id": "x" * 5000}}),
    "of nobody's": (404, "request_id", {"json": {"request_id": "x", "prdtypecode": 10}}),
    "a form": (404, "product_id", {"data": {"product_id": "nobody's", "prdtypecode": "10"}}),
}

@pytest.mark.parametrize("what", BODIES)
def test_bad_feedback_is_a_problem_document(what: str, api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    status, word, options = BODIES[what]
    assert word in problem(api.client.post("/feedback", **options | {"headers": options.get("headers", {}) | who["rose"]}), status)

def live(api: ApiProcess, header: dict[str, str], version: str) -> dict[str, dict[str, Any]]:
    "How often a model was right, by kind of answer."
    return {row["answers"]: row for row in api.client.get("/model", headers=header).json()["live"] if row["model_version"] == version}

def test_live_accuracy_is_counted_by_model_with_its_interval(api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    answer = asked(api, who["marie"], STRANGE.format("live"))
    before = live(api, who["marie"], answer["model_version"]).get("doubtful", {"n": 0, "right": 0})
    say(api, who["marie"], OTHER, request_id=answer["request_id"])
    say(api, who["rose"], right := answer["predictions"][0]["label"], request_id=answer["request_id"])
    after = live(api, who["marie"], answer["model_version"])["doubtful"]
    assert right != OTHER and (after["n"], after["right"]) == (before["n"] + 1, before["right"] + 1), "the reviewer's word goes before the user's"
    assert after["low"] < after["accuracy"] == after["right"] / after["n"] <= after["high"] + 1e-12
    def told() -> dict[str, float]:
        families = text_string_to_metric_families(api.client.get("/metrics").text)
        labels = ({"model_version": answer["model_version"], "answers": "doubtful"}, {})
        return {s.name: s.value for f in families for s in f.samples if s.labels in labels and s.name.startswith(("rakuten_feedback", "rakuten_live", "rakuten_review"))}
    wanted = {"rakuten_feedback_predictions": after["n"], "rakuten_live_accuracy": after["accuracy"], "rakuten_live_accuracy_low": after["low"],
              "rakuten_live_accuracy_high": after["high"], "rakuten_review_waiting": queue(api, who["rose"])["waiting"]}
    until(lambda: {name: told().get(name) for name in wanted} == {name: pytest.approx(value) for name, value in wanted.items()}, 10)

# --- the rows of a job

def test_doubtful_rows_of_a_job_wait_too_with_their_pictures(api: ApiProcess, who: dict[str, dict[str, str]], picture: bytes) -> None:
    titles = [STRANGE.format(f"lot {i}") for i in range(3)]
    titles[2] += "\0" # which PostgreSQL takes in no text
    table = "designation,description,productid,imageid\n" + "".join(f"\"{t}\",,{100 + i},{200 + i}\n" for i, t in enumerate(titles)) + ",,7,7\n"
    with zipfile.ZipFile(raw := io.BytesIO(), "w") as z:
        z.writestr("x.csv", table)
        z.writestr("image_201_product_101.jpg", picture)
    job = api.client.post("/jobs", files={"file": ("x.zip", raw.getvalue())}, headers=who["paul"]).json()["id"]
    until(lambda: api.client.get(f"/jobs/{job}", headers=who["paul"]).json()["status"] == "succeeded")
    lines = list(csv.DictReader(io.StringIO(api.client.get(f"/jobs/{job}/predictions.csv", headers=who["paul"]).text)))
    doubtful = [f"{job}-{i + 1}" for i, line in enumerate(lines) if line["needs_review"] == "true" and line["prdtypecode"]]
    items = {i["request_id"]: i for i in queue(api, who["rose"], user="paul", order="latest")["items"] if i["request_id"].startswith(job)}
    assert list(items)[::-1] == doubtful and len(doubtful) >= 2 and f"{job}-4" not in items, "in order; what had no answer is nothing to review"
    with_picture = items[f"{job}-2"]
    assert (with_picture["product_id"], with_picture["imageid"], with_picture["title"]) == ("101", "201", titles[1])
    assert api.client.get(with_picture["picture"], headers=who["rose"]).content == picture
    assert say(api, who["paul"], OTHER, request_id=f"{job}-1").status_code == 201 == say(api, who["rose"], OTHER, request_id=f"{job}-2").status_code

# --- what is kept

def command(api: ApiProcess, *args: object) -> subprocess.CompletedProcess[str]:
    "What an operator types beside a running API."
    return subprocess.run([sys.executable, "-m", "rakuten_nb.cli", *map(str, args)], env=api.env | {"COLUMNS": "200"}, cwd=api.home, capture_output=True,
                          text=True, check=False)

@pytest.mark.services
def test_a_product_a_request_and_a_user_are_forgotten(api: ApiProcess, who: dict[str, dict[str, str]]) -> None:
    own = encoded(Image.linear_gradient("L").convert("RGB").resize((90, 70)), "PNG")
    first = asked(api, who["marie"], STRANGE.format("to be forgotten"), own, product_id="forget-1")
    second = asked(api, who["marie"], STRANGE.format("without an id"))
    waits(api, who["rose"], second["request_id"])
    files = lambda: [p for p in (api.home / "data/kept").glob("??/*") if p.read_bytes() == own]
    assert len(files()) == 1 and (api.home / "data/kept").stat().st_mode & 0o77 == 0
    done = command(api, "store", "erase", "--product", "forget-1", "--yes")
    assert done.returncode == 0 and "1 predictions, 1 products, 0 feedback, 1 pictures" in done.stdout and not files(), done.stderr
    assert command(api, "store", "erase", "--request", second["request_id"], "--yes").returncode == 0
    left = {i["request_id"] for i in queue(api, who["rose"])["items"]}
    assert not left & {first["request_id"], second["request_id"]}
    problem(say(api, who["marie"], OTHER, request_id=first["request_id"]), 404)
    nothing = command(api, "store", "erase", "--product", "forget-1", "--yes")
    assert nothing.returncode == 2 and nothing.stderr.strip() == "error: product forget-1: not found in the store, nor in any job"
    api.add_users(gone="user")
    gone = api.token("gone")
    third = asked(api, gone, STRANGE.format("of somebody who leaves"))
    waits(api, who["rose"], third["request_id"])
    assert command(api, "store", "erase", "--user", "gone", "--yes").returncode == 0
    assert third["request_id"] not in {i["request_id"] for i in queue(api, who["rose"])["items"]}
    api.add_users(gone="reviewer") # somebody else, who is called so too
    until(lambda: api.client.get("/model", headers=gone).status_code == 401)
    assert api.client.get("/review", headers=api.token("gone")).status_code == 200
    shown = command(api, "store", "show")
    assert shown.returncode == 0 and "products for review or learning" in shown.stdout and "90 days" in shown.stdout

def test_who_keeps_nothing_has_nothing_to_review(env: dict[str, str], tmp_path: Path, bundle: Path, picture: bytes) -> None:
    with ApiProcess(env, tmp_path / "api", bundle, RAKUTEN_KEEP_DAYS="0") as api:
        api.add_users(**USERS)
        answer = asked(api, api.token("marie"), STRANGE.format("unkept"), picture)
        said = say(api, api.token("rose"), 10, request_id=answer["request_id"])
        assert said.status_code == 201 and said.json()["kept"] is False, "it counts for live accuracy all the same"
        assert queue(api, api.token("rose")) == {"waiting": 0, "items": [], "next": None}
        assert not list((api.home / "data").glob("kept/*/*"))
        api.stop()
        with contextlib.closing(sqlite3.connect(api.home / "data/rakuten.sqlite")) as c: dump = "\n".join(c.iterdump())
        assert "Zorblax" not in dump and answer["request_id"] in dump
        assert b"Zorblax" not in b"".join(p.read_bytes() for p in (api.home / "data").rglob("*") if p.is_file() and "models" not in p.parts)
        assert "zorblax" not in api.log().lower(), "nor does the log hold what a merchant wrote"

@pytest.mark.parametrize("full", [False, True])
def test_a_picture_that_finds_no_place_costs_no_answer(full: bool, env: dict[str, str], tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "api/data").mkdir(parents=True)
    if not full: (tmp_path / "api/data/kept").write_text("a file where a folder should be")
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)), "PNG") # 2.4 MB
    with ApiProcess(env, tmp_path / "api", bundle) as api:
        api.add_users(**USERS)
        marie, rose = api.token("marie"), api.token("rose")
        assert api.process
        if full: resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, (2**21, resource.RLIM_INFINITY)) # as much as the disk takes of a file
        answer = asked(api, marie, STRANGE.format("no place"), noise)
        until(lambda: "rakuten_products_not_retained_total 1.0" in api.client.get("/metrics").text)
        assert say(api, rose, 10, request_id=answer["request_id"]).json()["kept"] is False
        assert "a product could not be retained" in api.log() and "Zorblax" not in api.log() and "Traceback" not in api.terminal()
        after = asked(api, marie, STRANGE.format("without a picture"))
        assert waits(api, rose, after["request_id"])["title"] == STRANGE.format("without a picture"), "and what comes later is kept"

# --- the loop is closed

@pytest.mark.services
@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def test_the_life_of_a_doubtful_product(database: str, request: pytest.FixtureRequest, own_api: ApiProcess, sample_catalog: Path, rakuten: Run, tmp_path: Path,
                                        picture: bytes) -> None:
    if database == "postgresql": own_api.env["RAKUTEN_DATABASE_URL"] = request.getfixturevalue("postgres")
    api = own_api.start()
    api.add_users(**USERS)
    marie, rose, root = (api.token(name) for name in USERS)
    title = STRANGE.format("unique en son genre, quinvert de gradules")
    # predicted: wrongly, and the service says that it is not sure
    first = asked(api, marie, title, picture, product_id="31415926")
    wrong, version = first["predictions"][0]["label"], first["model_version"]
    truth = next(code for code in reversed(CODES) if code not in [p["label"] for p in first["predictions"]])
    assert first["needs_review"]
    # in review: with what a person needs to see
    item = waits(api, rose, first["request_id"])
    assert item["title"] == title and api.client.get(item["picture"], headers=rose).content == picture
    # corrected
    assert say(api, rose, truth, request_id=first["request_id"]).status_code == 201
    assert queue(api, rose)["waiting"] == 0 and live(api, root, version)["all"]["right"] == 0
    # and so is a product that is gold, and one that comes near to it; nothing is to be learned from these
    catalog = read_catalog(sample_catalog)
    gold = next(i for i in is_gold(catalog.train).nonzero()[0] if len(str(catalog.train.title[i]).split()) > 5)
    words, text = str(catalog.train.title[gold]), str(catalog.train.description[gold])
    nearly = next(t for w in words.split() if not is_gold(make_products([t := f"{words} {w}"], [text]))[0]) # no word is new, and it is another text
    for one in (words, nearly):
        near = asked(api, marie, one, description=text)
        assert say(api, rose, truth, request_id=near["request_id"]).status_code == 201
    # exported
    out = tmp_path / "reviewed"
    exported = command(api, "feedback", "export", out, "--onto", sample_catalog)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    new, old = read_catalog(out), read_catalog(sample_catalog)
    assert len(new.labelled) == len(old.labelled) + 1 and new.labelled.title[-1] == title and CODES[new.labelled.label[-1]] == truth
    assert new.labelled.productid[-1] == "31415926" and new.labelled.picture[-1].read_bytes() == picture
    assert (new.labelled.label[:-1] == old.labelled.label).all(), "gold has its old label"
    with (out / "left_out.csv").open(encoding="utf-8") as f: reasons = [line["reason"] for line in csv.DictReader(f)]
    assert sorted(reasons) == ["gold: models are evaluated on it", "near duplicate of a gold product"]
    # trained on
    trained = rakuten("train", out, "--bundle", tmp_path / "bundle", "--experts", "text_linear")
    assert trained.returncode == 0, trained.stderr
    served = Path(api.env["RAKUTEN_BUNDLE"])
    shutil.rmtree(served)
    shutil.copytree(tmp_path / "bundle", served)
    assert api.client.post("/model/reload", headers=root).status_code == 202
    until(lambda: api.client.get("/status").json()["model_version"] != version, 30)
    # then predicted right, by a model that has no mistake of its own yet
    second = asked(api, marie, title, picture, product_id="31415926")
    assert second["predictions"][0]["label"] == truth != wrong and second["model_version"] != version
    assert second["predictions"][0]["confidence"] > next((p["confidence"] for p in first["predictions"] if p["label"] == truth), 0)
    time.sleep(1.2) # as long as the journal may take
    assert queue(api, rose)["waiting"] == 0, "what was reviewed does not wait again, whatever the new model thinks of it"
    assert live(api, root, version)["all"]["n"] == 3 and not live(api, root, second["model_version"])
