"The API as its clients meet it: a process of its own, over HTTP."
import base64
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pytest
import sqlalchemy as sa
from api_process import KEY, PASSWORD, ApiProcess, free_port, memory_mb
from conftest import ROOT
from hard_products import HOW_MANY, encoded, sixteen_bit, turned
from PIL import Image

from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.picture import picture_bytes
from rakuten_nb.store.database import change_user, predictions

STRANGE = "🎁 <script>alert('é')</script>&amp; '; DROP TABLE users; -- \u202e ../../etc/passwd"

def picture(side: int = 64, kind: str = "JPEG") -> bytes:
    "A picture with something on it."
    rng = np.random.default_rng(side)
    return encoded(Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)), kind)

@pytest.fixture(scope="session")
def marie(api: ApiProcess) -> dict[str, str]:
    "The header of an ordinary user."
    return api.token("marie")

def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    "The document of an answer that says no."
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert set(document) == {"type", "title", "status", "detail", "request_id"} and document["status"] == status
    assert document["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and str(ROOT) not in answer.text
    return document

# --- the same answers as everywhere else

def test_the_fifty_products_agree(api: ApiProcess, marie: dict[str, str], trained: Path, hard_catalog: Path) -> None:
    products = read_catalog(hard_catalog).split("all")
    with np.load(trained / "said.npz", allow_pickle=False) as said: codes, confidence = said["code"], said["confidence"]
    assert len(products) == HOW_MANY
    for i in range(HOW_MANY):
        source = products.picture[i]
        raw = None if source is None else picture_bytes(source)
        answer = api.predict(marie, products.title[i], products.description[i], raw, product_id=products.productid[i])
        if answer.status_code == 422: assert codes[i] in ("", 0, -1), answer.text
        else:
            first = answer.json()["predictions"][0]
            assert str(first["label"]) == str(codes[i]) and abs(first["confidence"] - confidence[i]) < 1e-5

def test_many_at_once_get_the_answers_of_one_alone(api: ApiProcess, marie: dict[str, str]) -> None:
    titles = [f"Lot de {n} cartes Pokémon" if n % 2 else f"Piscine ronde {n} m" for n in range(24)]
    alone = [api.predict(marie, t).json()["predictions"] for t in titles]
    found: dict[int, Any] = {}
    def ask(n: int) -> None: found[n] = httpx.post(f"{api.url}/predict", data={"designation": titles[n]}, headers=marie, timeout=60).json()["predictions"]
    crowd = [threading.Thread(target=ask, args=(n,)) for n in range(24)]
    for t in crowd: t.start()
    for t in crowd: t.join()
    for n in range(24):
        assert [p["label"] for p in found[n]] == [p["label"] for p in alone[n]]
        assert all(abs(a["confidence"] - b["confidence"]) < 1e-6 for a, b in zip(found[n], alone[n], strict=True))

def test_an_answer_says_what_the_contract_says(api: ApiProcess, marie: dict[str, str]) -> None:
    answer = api.predict(marie, "Console rétro", picture=picture(), product_id="4711", imageid="12", product_identifier="0").json()
    assert set(answer) == {"predictions", "message", "needs_review", "experts", "model_version", "request_id"}
    assert len(answer["predictions"]) == 5 and set(answer["predictions"][0]) == {"label", "name", "name_en", "confidence", "prediction"}
    assert isinstance(answer["predictions"][0]["label"], int) and set(answer["experts"]) == {"text_linear", "image"}
    assert abs(sum(answer["experts"].values()) - 1) < 1e-6

def test_both_kinds_of_form_say_the_same(api: ApiProcess, marie: dict[str, str]) -> None:
    both = [api.client.post("/predict", headers=marie, **how).json()["predictions"]
            for how in ({"data": {"designation": "Été à l'eau"}}, {"files": {"designation": (None, "Été à l'eau")}})]
    assert both[0] == both[1]

# --- what is refused, and what is not

def forged(**changes: Any) -> str:
    "A token like the service's, but for some claims."
    now = int(time.time())
    return jwt.encode({"sub": "marie", "scope": "predict", "gen": 0, "iat": now, "exp": now + 600} | changes, KEY, "HS256")

def unsigned() -> str:
    "A token that asks not to be checked."
    part = lambda claims: base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part({'sub': 'root', 'scope': 'admin', 'gen': 0, 'iat': 0, 'exp': 2**31})}."

TOKENS: dict[str, Callable[[], dict[str, str]]] = {
    "none": dict, "nonsense": lambda: {"Authorization": "Bearer nonsense"}, "basic": lambda: {"Authorization": "Basic bWFyaWU6eA=="},
    "empty": lambda: {"Authorization": "Bearer"}, "expired": lambda: {"Authorization": f"Bearer {forged(exp=int(time.time()) - 1)}"},
    "alg none": lambda: {"Authorization": f"Bearer {unsigned()}"}, "nobody": lambda: {"Authorization": f"Bearer {forged(sub='nobody')}"},
    "another key": lambda: {"Authorization": "Bearer " + jwt.encode({"sub": "root", "scope": "admin", "gen": 0, "iat": 0, "exp": 2**31}, "x" * 48, "HS256")},
    "another generation": lambda: {"Authorization": f"Bearer {forged(gen=7)}"}, "NUL": lambda: {"Authorization": f"Bearer {forged(sub=chr(0))}"},
}

@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_that_proves_nothing(kind: str, api: ApiProcess) -> None:
    answer = api.predict(TOKENS[kind](), "Jeu")
    problem(answer, 401)
    assert answer.headers["www-authenticate"] == "Bearer"

def test_a_right_token_is_taken_from_the_header_only(api: ApiProcess, marie: dict[str, str]) -> None:
    token = marie["Authorization"].removeprefix("Bearer ")
    for name in ("token", "access_token", "authorization"): problem(api.client.post("/predict", params={name: token}, data={"designation": "Jeu"}), 401)
    problem(api.client.post("/predict", headers={"Cookie": f"access_token={token}"}, data={"designation": "Jeu"}), 401)
    assert api.predict({"Authorization": f"Bearer {forged()}"}, "Jeu").status_code == 200, "so the forged ones fail for the one thing that is wrong with them"

def truncated() -> bytes: return picture(256)[:-2000]

def bomb() -> bytes:
    "A PNG whose header claims 40,000 × 40,000 pixels."
    import struct
    import zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")

REFUSED: dict[str, tuple[int, str, Callable[[], dict[str, Any]]]] = {
    "nothing": (422, "a title or a picture", dict),
    "a description alone": (422, "a title or a picture", lambda: {"data": {"description": "Un jeu de société"}}),
    "a title of 1 MB": (413, "designation and description", lambda: {"data": {"designation": "x" * 2**20}}),
    "text too long together": (413, "found 300,000", lambda: {"data": {"designation": "x" * 150_000, "description": "x" * 150_000}}),
    "an upload of 30 MB": (413, "10 MiB", lambda: {"data": {"designation": "Jeu"}, "files": {"image": ("a.jpg", b"\xff\xd8\xff" + b"x" * 30_000_000)}}),
    "text named .jpg": (422, "not a JPEG, PNG or WebP", lambda: {"data": {"designation": "Jeu"}, "files": {"image": ("a.jpg", b"Bonjour", "image/jpeg")}}),
    "a truncated picture": (422, "truncated", lambda: {"data": {"designation": "Jeu"}, "files": {"image": ("a.jpg", truncated())}}),
    "40,000 × 40,000": (422, "40000×40000", lambda: {"files": {"image": ("a.png", bomb())}}),
    "a GIF": (422, "not a JPEG, PNG or WebP", lambda: {"files": {"image": ("a.gif", picture(16, "GIF"))}}),
    "NUL in the title": (422, "designation: expected no NUL", lambda: {"data": {"designation": "Jeu\0x"}}),
    "NUL in an id": (422, "product_id: expected no NUL", lambda: {"data": {"designation": "Jeu", "product_id": "\0"}}),
    "Latin-1": (422, "designation: expected UTF-8", lambda: {"content": "designation=été".encode("latin-1"),
                                                             "headers": {"Content-Type": "application/x-www-form-urlencoded"}}),
    "a field twice": (422, "designation: expected once", lambda: {"data": {"designation": ["Jeu", "Jouet"]}}),
    "an unknown field": (422, "'title'", lambda: {"data": {"title": "Jeu"}}),
    "JSON": (415, "application/json", lambda: {"json": {"designation": "Jeu"}}),
    "a form cut off": (400, "cut off", lambda: {"content": b'--b\r\nContent-Disposition: form-data; name="designation"\r\n\r\nJeu\r\n',
                                                "headers": {"Content-Type": "multipart/form-data; boundary=b"}}),
}

@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_request_is_a_problem_document(what: str, api: ApiProcess, marie: dict[str, str]) -> None:
    status, word, make = REFUSED[what]
    options = make()
    answer = api.client.post("/predict", **options | {"headers": options.get("headers", {}) | marie})
    assert word in problem(answer, status)["detail"]
    assert api.predict(marie, "Jeu").status_code == 200, "and the service goes on"

def test_a_body_is_not_read_before_the_token(api: ApiProcess) -> None:
    def endless() -> Any:
        for _ in range(2000): yield b"x" * 65536
    answer = api.client.post("/predict", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    problem(answer, 401)

ODD_PICTURES: dict[str, Callable[[Image.Image], bytes]] = {
    "CMYK": lambda i: encoded(i.convert("CMYK"), "JPEG"), "16-bit": sixteen_bit, "turned": turned,
    "animated": lambda i: encoded(i, "WEBP", save_all=True, append_images=[i.rotate(90)], lossless=True),
    "animated PNG": lambda i: encoded(i, "PNG", save_all=True, append_images=[i.rotate(90)]),
    "one pixel": lambda i: encoded(i.resize((1, 1)), "PNG"), "palette": lambda i: encoded(i.convert("P"), "PNG"),
}

@pytest.mark.parametrize("kind", ODD_PICTURES)
def test_an_odd_picture_is_answered(kind: str, api: ApiProcess, marie: dict[str, str]) -> None:
    raw = ODD_PICTURES[kind](Image.open(BytesIO(picture(80))))
    assert api.predict(marie, picture=raw).status_code == 200

def test_anything_a_merchant_may_write_is_answered(api: ApiProcess, marie: dict[str, str]) -> None:
    fields = dict.fromkeys(("designation", "description", "product_identifier", "product_id", "imageid"), STRANGE)
    for how in ({"data": fields}, {"data": fields, "files": {"image": ("../../../etc/passwd\u202e.exe", picture(), "text/html")}}):
        answer = api.client.post("/predict", headers=marie, **how)
        assert answer.status_code == 200, answer.text
        deadline = time.monotonic() + 20
        while not (row := written(api, answer.json()["request_id"])) and time.monotonic() < deadline: time.sleep(0.05)
        assert row["product_id"] == STRANGE and len(row["profile"]) == 8 and row["user"] == "marie"

def written(api: ApiProcess, request_id: str) -> dict[str, Any]:
    "What the store has of a prediction."
    store = api.store()
    try:
        with store.reading() as c: row = c.execute(sa.select(predictions).where(predictions.c.request_id == request_id)).mappings().first()
        return dict(row) if row else {}
    finally: store.close()

# --- who may do what

def test_logging_in(api: ApiProcess) -> None:
    answer = api.client.post("/token", data={"username": "rose", "password": PASSWORD, "grant_type": "password"})
    assert answer.json()["token_type"] == "bearer" and answer.json()["scope"] == "predict jobs feedback review"
    assert answer.headers["cache-control"] == "no-store"
    claims = jwt.decode(answer.json()["access_token"], KEY, ["HS256"])
    assert claims["sub"] == "rose" and claims["exp"] - claims["iat"] == answer.json()["expires_in"]
    problem(api.client.post("/token", data={"username": "marie", "password": PASSWORD, "scope": "admin"}), 400)
    problem(api.client.post("/token", json={"username": "marie", "password": PASSWORD}), 415)
    problem(api.client.post("/token", data={"username": "marie"}), 422)
    problem(api.client.post("/token", data={"username": "marie", "password": "x" * 20_000}), 413)
    assert "72 bytes" in problem(api.client.post("/token", data={"username": "long", "password": "x" * 73}), 401)["detail"]

def test_guessing_is_slowed_by_user_and_address(api: ApiProcess) -> None:
    guess = lambda name: api.client.post("/token", data={"username": name, "password": "wrong"})
    assert [guess("victor").status_code for _ in range(6)] == [401] * 5 + [429]
    answer = guess("victor")
    assert "log-ins" in problem(answer, 429)["detail"] and 1 <= int(answer.headers["retry-after"]) <= 60
    assert guess("hugo").status_code == 401 and api.token("marie"), "others are not held up"

def test_scopes_are_kept(api: ApiProcess) -> None:
    only_feedback = api.token("marie", scope="feedback")
    problem(api.predict(only_feedback, "Jeu"), 403)
    problem(api.client.post("/model/reload", headers=api.token("rose")), 403)
    problem(api.client.post("/model/reload", headers=api.token("root", scope="predict")), 403)
    assert api.client.get("/model", headers=only_feedback).status_code == 200

def test_a_disabled_user_is_out_within_fifteen_seconds(own_api: ApiProcess) -> None:
    own_api.start().add_users(paul="user")
    paul = own_api.token("paul")
    assert own_api.predict(paul, "Jeu").status_code == 200
    store = own_api.store()
    change_user(store, "paul", disabled=True)
    began = time.monotonic()
    while own_api.predict(paul, "Jeu").status_code == 200: assert time.monotonic() - began < 15; time.sleep(0.2)
    problem(own_api.predict(paul, "Jeu"), 401)
    problem(own_api.client.post("/token", data={"username": "paul", "password": PASSWORD}), 401)
    change_user(store, "paul", disabled=False)
    own_api.token("paul")
    store.close()
    time.sleep(10.5) # until what the process remembers of paul is too old to be believed
    problem(own_api.predict(paul, "Jeu"), 401)

def test_the_limit_is_the_users(own_api: ApiProcess) -> None:
    own_api.env["RAKUTEN_RATE_LIMIT_PREDICT"] = "3/minute"
    own_api.start().add_users(paul="user", anna="user")
    paul, anna = own_api.token("paul"), own_api.token("anna")
    told = [own_api.client.post(path, data={"designation": "Jeu"}, headers=paul) for path in ("/predict", "/predict_code", "/predict", "/predict_code")]
    assert [a.status_code for a in told] == [200, 200, 200, 429] and [a.headers["ratelimit-remaining"] for a in told] == ["2", "1", "0", "0"]
    assert 1 <= int(told[3].headers["retry-after"]) <= 60 and told[3].headers["ratelimit-limit"] == "3"
    problem(told[3], 429)
    assert own_api.predict(anna, "Jeu").status_code == 200
    assert all(own_api.client.get(path).status_code == 200 for path in ("/status", "/health", "/ready", "/metrics") for _ in range(10))

# --- what the operator sees

def test_a_request_is_one_line_that_holds_no_secret(api: ApiProcess) -> None:
    header = api.token("marie")
    answer = api.client.post("/predict?token=in-the-query", data={"designation": "un titre confidentiel", "description": "secret"}, files={"image": picture()},
                             headers=header | {"X-Request-ID": "order-4711"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "order-4711"
    lines = [json.loads(line) for line in api.log().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "order-4711"]
    assert {k: line[k] for k in ("method", "path", "status", "user", "model_version")} == {
        "method": "POST", "path": "/predict", "status": 200, "user": "marie", "model_version": answer.json()["model_version"]}
    assert line["seconds"] > 0
    for secret in ("confidentiel", "in-the-query", PASSWORD, KEY, header["Authorization"].split(".")[1]): assert secret not in api.log() + api.terminal()

def test_a_harmful_request_id_is_not_taken(api: ApiProcess) -> None:
    for given in ("a b", "x" * 65, '"}{', "é"):
        answer = api.client.get("/status", headers={"X-Request-ID": given.encode()})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

def test_the_numbers_of_the_contract(api: ApiProcess, marie: dict[str, str]) -> None:
    version = api.predict(marie, "Jeu", picture=picture()).json()["model_version"]
    text = api.client.get("/metrics").text
    for name in ("http_requests_total{", "http_request_duration_seconds_bucket{", "rakuten_predictions_total{code=", "rakuten_confidence_bucket{",
                 "rakuten_review_total ", 'rakuten_expert_total{expert="image"}', "rakuten_inference_seconds_count ", "rakuten_decode_seconds_count ",
                 f'rakuten_model_info{{model_version="{version}"}} 1.0'):
        assert name in text
    assert "process_resident_memory_bytes" in text

def test_headers_that_keep_a_browser_honest(api: ApiProcess) -> None:
    for path in ("/status", "/nowhere", "/predict"):
        headers = api.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"

def test_what_there_is_not(api: ApiProcess) -> None:
    problem(api.client.get("/predicts"), 404)
    answer = api.client.get("/predict")
    problem(answer, 405)
    assert answer.headers["allow"] == "POST"

def test_the_openapi_document(api: ApiProcess) -> None:
    document = api.client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/token", "/status", "/health", "/ready", "/predict", "/predict_code", "/model", "/model/reload", "/metrics",
                                      "/jobs", "/jobs/{id}", "/jobs/{id}/predictions.csv", "/jobs/{id}/predictions.parquet",
                                      "/review", "/review/{id}/picture", "/review/{id}/explanation", "/feedback", "/feedback/{request_id}"}
    post = document["paths"]["/predict"]["post"]
    assert {"200", "401", "413", "415", "422", "429", "503"} <= set(post["responses"]) and post["security"]
    assert all(list(post["responses"][s]["content"]) == ["application/problem+json"] for s in post["responses"] if s != "200")
    fields = post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(fields) == {"designation", "description", "product_identifier", "product_id", "imageid", "image", "explain"}
    assert fields["designation"]["examples"]
    assert document["components"]["securitySchemes"]["OAuth2PasswordBearer"]["flows"]["password"]["tokenUrl"] == "token"

# --- starting, reloading, stopping

def test_it_does_not_start_without_a_key(own_api: ApiProcess) -> None:
    own_api.env.pop("SECRET_KEY")
    own_api.start(wait=False)
    assert own_api.process and own_api.process.wait(60) != 0
    said = [line for line in own_api.terminal().splitlines() if "SECRET_KEY" in line]
    assert len(said) == 1 and "secrets.token_urlsafe" in said[0] and "Traceback" not in own_api.terminal()

def test_it_waits_for_a_model(own_api: ApiProcess) -> None:
    (own_api.home / "bundle").rename(own_api.home / "later")
    own_api.start().add_users(marie="user", root="admin")
    problem(own_api.client.get("/ready"), 503)
    answer = own_api.predict(own_api.token(), "Jeu")
    problem(answer, 503)
    assert answer.headers["retry-after"]
    assert own_api.client.get("/health").status_code == 200
    (own_api.home / "later").rename(own_api.home / "bundle")
    own_api.wait_until("/ready", {200})

def reloaded(api: ApiProcess, admin: dict[str, str]) -> dict[str, Any]:
    "Ask for the bundle that is there now, and wait for what comes of it."
    asked = api.client.post("/model/reload", headers=admin)
    assert asked.status_code == 202
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        news: dict[str, Any] = api.client.get("/model", headers=admin).json()
        if news["request"] == asked.json()["request"] and news["followed"]: return news
        time.sleep(0.1)
    raise AssertionError("nobody followed within 15 s")

def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

def test_a_damaged_bundle_keeps_the_old_model(own_api: ApiProcess) -> None:
    own_api.start().add_users(root="admin")
    admin = own_api.token("root")
    version = own_api.client.get("/status").json()["model_version"]
    flip_a_byte(own_api.home / "bundle/experts/image/backbone.onnx")
    news = reloaded(own_api, admin)
    assert news["model_version"] == version and "experts/image/backbone.onnx: differs" in news["followed"][0]["error"]
    assert str(own_api.home) not in json.dumps(news)
    assert own_api.predict(admin, "Jeu", picture=picture()).json()["model_version"] == version and own_api.client.get("/ready").status_code == 200
    own_api.stop()
    own_api.start()
    assert own_api.client.get("/status").json()["model_version"] == version, "a restart falls back on the copy"

def test_replacing_the_bundle_disturbs_no_request(own_api: ApiProcess, sample_catalog: Path, rakuten: Any) -> None:
    own_api.start().add_users(root="admin")
    admin, raw, statuses, stop = own_api.token("root"), picture(), [], threading.Event()
    def ask() -> None:
        with httpx.Client(base_url=own_api.url, timeout=60) as client:
            while not stop.is_set(): statuses.append(client.post("/predict", data={"designation": "Jeu"}, files={"image": raw}, headers=admin).status_code)
    crowd = [threading.Thread(target=ask) for _ in range(3)]
    for t in crowd: t.start()
    before = own_api.client.get("/status").json()["model_version"]
    shutil.rmtree(own_api.home / "bundle") # as DVC does before it runs a stage again
    time.sleep(0.5)
    made = rakuten("train", sample_catalog, "--bundle", own_api.home / "bundle", "--experts", "text_linear")
    assert made.returncode == 0, made.stderr
    news = reloaded(own_api, admin)
    time.sleep(0.3)
    stop.set()
    for t in crowd: t.join()
    assert news["model_version"] != before and not news["error"]
    assert len(statuses) > 10 and set(statuses) == {200}

def test_sigterm_finishes_what_is_under_way(own_api: ApiProcess) -> None:
    own_api.start().add_users(marie="user")
    header, raw, found = own_api.token(), picture(1500, "PNG"), []
    def ask(n: int) -> None: found.append(httpx.post(f"{own_api.url}/predict", data={"product_id": str(n)}, files={"image": raw}, headers=header, timeout=60))
    crowd = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for t in crowd: t.start()
    while 'handler="/predict"' not in own_api.client.get("/metrics").text and not found: time.sleep(0.01) # until the first is through
    own_api.stop(signal.SIGTERM)
    for t in crowd: t.join()
    assert [a.status_code for a in found] == [200] * 8
    assert all(written(own_api, a.json()["request_id"]) for a in found), "and what was predicted is written down"

def test_two_that_make_the_store_at_once_both_come_up(own_api: ApiProcess, env: dict[str, str]) -> None:
    other = ApiProcess(env, own_api.home, own_api.home / "bundle")
    for a in (own_api, other): a.start(wait=False)
    for a in (own_api, other): a.wait_until("/ready", {200})
    own_api.add_users(marie="user")
    assert other.predict(own_api.token(), "Jeu").status_code == 200, "and know the same users"
    other.__exit__()

def test_the_command_line_serves(own_api: ApiProcess) -> None:
    port = free_port()
    command = [sys.executable, "-m", "rakuten_nb.cli", "serve", "--bundle", own_api.home / "bundle", "--port", str(port)]
    with subprocess.Popen(command, env=own_api.env, cwd=own_api.home, stderr=subprocess.PIPE, text=True) as process:
        own_api.process, own_api.client = process, httpx.Client(base_url=f"http://127.0.0.1:{port}") # type: ignore[assignment]
        (own_api.home / "terminal.log").touch()
        own_api.wait_until("/ready", {200})
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert "users add NAME" in said and f"http://127.0.0.1:{port}/docs" in said and "Traceback" not in said
    assert (own_api.home / "logs/serving_logger.log").exists()

def test_an_endless_header_is_cut_off(api: ApiProcess) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as line, pytest.raises(OSError):
        line.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(1000): line.sendall(b"a" * 65536)
    assert api.client.get("/status").status_code == 200

def test_large_pictures_stay_within_the_memory_of_a_container(own_api: ApiProcess) -> None:
    own_api.start().add_users(marie="user")
    header, large = own_api.token(), encoded(Image.new("RGBA", (7000, 7000)), "PNG")
    found: list[int] = []
    def ask() -> None: found.append(httpx.post(f"{own_api.url}/predict", files={"image": large}, headers=header, timeout=120).status_code)
    crowd = [threading.Thread(target=ask) for _ in range(3)]
    for t in crowd: t.start()
    time.sleep(0.3) # until they are there; each takes a second
    assert own_api.predict(header, "Jeu", picture=picture()).status_code == 200 and not found, "nobody waits for them"
    for t in crowd: t.join()
    assert own_api.process and found == [200] * 3 and memory_mb(own_api.process.pid) < 900, "compose.yaml gives it 1 GiB"

BAD_STARTS: dict[str, tuple[dict[str, str], str]] = {
    "a limit that is none": ({"RAKUTEN_RATE_LIMIT_PREDICT": "often"}, "such as 10/minute"),
    "no algorithm": ({"ALGORITHM": "none"}, "ALGORITHM"), "a short key": ({"SECRET_KEY": "short"}, "SECRET_KEY: expected 32"),
    "no database": ({"RAKUTEN_DATABASE_URL": "nonsense"}, "RAKUTEN_DATABASE_URL: expected sqlite:///FILE"),
    "no Redis": ({"RAKUTEN_REDIS_URL": "redis://:hush@localhost:abc/0"}, "RAKUTEN_REDIS_URL: expected redis://"),
    "a token for ever": ({"ACCESS_TOKEN_EXPIRE_MINUTES": "-1"}, "ACCESS_TOKEN_EXPIRE_MINUTES"),
}

@pytest.mark.parametrize("what", BAD_STARTS)
def test_a_bad_setting_is_one_line(what: str, own_api: ApiProcess) -> None:
    settings, word = BAD_STARTS[what]
    own_api.env |= settings
    own_api.start(wait=False)
    assert own_api.process and own_api.process.wait(60) != 0
    said = [line for line in own_api.terminal().splitlines() if word in line]
    assert len(said) == 1 and "Traceback" not in own_api.terminal() and "hush" not in own_api.terminal()

def test_what_the_command_line_refuses(api: ApiProcess) -> None:
    cases: list[tuple[list[str], bytes, str]] = [
        (["serve", "--port", str(api.port)], b"", "cannot listen there"),
        (["users", "add", "bob", "--password-stdin"], b"\xff\xfe not UTF-8", "expected UTF-8"),
        (["users", "add", "bob", "--password-stdin"], b"two\nlines\n", "expected one line"),
        (["users", "add", "bob"], b"", "--password-stdin"), (["users", "add", "marie", "--password-stdin"], b"long enough", "there is one already"),
        (["users", "add", "-x", "--role", "king"], b"", ""), (["users", "disable", "nobody"], b"", "there is none"),
    ]
    for words, typed, said in cases:
        answer = subprocess.run([sys.executable, "-m", "rakuten_nb.cli", *words], input=typed, env=api.env, cwd=api.home, capture_output=True, check=False)
        assert answer.returncode == 2 and said in answer.stderr.decode() and b"Traceback" not in answer.stderr, words
