"The API over HTTP, in a process of its own: answers, refusals, permissions, logs, start and stop."
import base64
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
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
from rakuten_nb.store.database import predictions
from rakuten_nb.store.users import change_user

STRANGE = "🎁 <script>alert('é')</script>&amp; '; DROP TABLE users; -- \u202e ../../etc/passwd"

def picture(side: int = 64, kind: str = "JPEG") -> bytes:
    "A picture of random pixels."
    rng = np.random.default_rng(side)
    return encoded(Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)), kind)

@pytest.fixture(scope="session")
def marie(api: ApiProcess) -> dict[str, str]:
    "The header of a user."
    return api.token("marie")

def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    "The problem document of a response."
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert set(document) == {"type", "title", "status", "detail", "request_id"} and document["status"] == status
    assert document["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text and str(ROOT) not in response.text
    return document

def run_all(work: Callable[[int], object], n: int) -> None:
    "Run `work(0)` to `work(n - 1)` in threads and wait for them."
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

# --- predictions

def test_predicts_fifty_hard_products_as_the_command_line_does(
    api: ApiProcess, marie: dict[str, str], trained: Path, hard_catalog: Path,
) -> None:
    products = read_catalog(hard_catalog).split("all")
    with np.load(trained / "predictions.npz", allow_pickle=False) as expected:
        codes, confidence = expected["code"], expected["confidence"]
    assert len(products) == HOW_MANY
    for i in range(HOW_MANY):
        source = products.picture[i]
        raw = None if source is None else picture_bytes(source)
        response = api.predict(marie, products.title[i], products.description[i], raw, product_id=products.productid[i])
        if response.status_code == 422: assert codes[i] in ("", 0, -1), response.text
        else:
            first = response.json()["predictions"][0]
            assert str(first["label"]) == str(codes[i]) and abs(first["confidence"] - confidence[i]) < 1e-5

def test_predicts_many_products_at_once_as_each_alone(api: ApiProcess, marie: dict[str, str]) -> None:
    titles = [f"Lot de {n} cartes Pokémon" if n % 2 else f"Piscine ronde {n} m" for n in range(24)]
    alone = [api.predict(marie, title).json()["predictions"] for title in titles]
    together: dict[int, Any] = {}
    def ask(n: int) -> None:
        response = httpx.post(f"{api.url}/predict", data={"designation": titles[n]}, headers=marie, timeout=60)
        together[n] = response.json()["predictions"]
    run_all(ask, 24)
    for n in range(24):
        assert [p["label"] for p in together[n]] == [p["label"] for p in alone[n]]
        assert all(abs(a["confidence"] - b["confidence"]) < 1e-6 for a, b in zip(together[n], alone[n], strict=True))

def test_a_response_has_the_fields_of_the_contract(api: ApiProcess, marie: dict[str, str]) -> None:
    ids = {"product_id": "4711", "imageid": "12", "product_identifier": "0"}
    response = api.predict(marie, "Console rétro", picture=picture(), **ids).json()
    assert set(response) == {"predictions", "message", "needs_review", "experts", "model_version", "request_id"}
    first = response["predictions"][0]
    assert len(response["predictions"]) == 5 and set(first) == {"label", "name", "name_en", "confidence", "prediction"}
    assert isinstance(first["label"], int) and set(response["experts"]) == {"text_linear", "image"}
    assert abs(sum(response["experts"].values()) - 1) < 1e-6

def test_both_form_encodings_give_the_same_prediction(api: ApiProcess, marie: dict[str, str]) -> None:
    forms: tuple[dict[str, Any], ...] = (
        {"data": {"designation": "Été à l'eau"}}, {"files": {"designation": (None, "Été à l'eau")}})
    both = [api.client.post("/predict", headers=marie, **form).json()["predictions"] for form in forms]
    assert both[0] == both[1]

# --- tokens

def signed(generation: int, key: str = KEY, **changes: Any) -> dict[str, str]:
    "A header with a token like the service's, except for some claims."
    now = int(time.time())
    claims = {"sub": "marie", "scope": "predict", "gen": generation, "iat": now, "exp": now + 600} | changes
    return {"Authorization": f"Bearer {jwt.encode(claims, key, 'HS256')}"}

def unsigned(generation: int) -> dict[str, str]:
    "A header with a token whose algorithm is none."
    now = int(time.time())
    part = lambda claims: base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    head = {"alg": "none", "typ": "JWT"}
    claims = {"sub": "marie", "scope": "predict", "gen": generation, "iat": now, "exp": now + 600}
    return {"Authorization": f"Bearer {part(head)}.{part(claims)}."}

TOKENS: dict[str, Callable[[int], dict[str, str]]] = { # kind → header, for the generation of marie
    "none": lambda g: {}, "nonsense": lambda g: {"Authorization": "Bearer nonsense"},
    "basic": lambda g: {"Authorization": "Basic bWFyaWU6eA=="}, "empty": lambda g: {"Authorization": "Bearer"},
    "expired": lambda g: signed(g, exp=int(time.time()) - 1), "alg none": unsigned,
    "unknown user": lambda g: signed(g, sub="nobody"), "another generation": lambda g: signed(g + 7),
    "another key": lambda g: signed(g, "x" * 48), "NUL": lambda g: signed(g, sub=chr(0)),
}

@pytest.mark.parametrize("kind", TOKENS)
def test_refuses_an_invalid_token(kind: str, api: ApiProcess) -> None:
    response = api.predict(TOKENS[kind](api.generation("marie")), "Jeu")
    problem(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"

def test_accepts_a_token_in_the_header_only(api: ApiProcess, marie: dict[str, str]) -> None:
    token = marie["Authorization"].removeprefix("Bearer ")
    for name in ("token", "access_token", "authorization"):
        problem(api.client.post("/predict", params={name: token}, data={"designation": "Jeu"}), 401)
    cookie = {"Cookie": f"access_token={token}"}
    problem(api.client.post("/predict", headers=cookie, data={"designation": "Jeu"}), 401)
    valid = api.predict(signed(api.generation("marie")), "Jeu")
    assert valid.status_code == 200, "the tokens above fail for their one wrong claim"

# --- refused requests

def truncated() -> bytes: return picture(256)[:-2000]

def bomb() -> bytes:
    "A PNG whose header claims 40,000 × 40,000 pixels."
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)

def form(image: tuple[Any, ...] | None = None, **data: Any) -> dict[str, Any]:
    "The options of a request with a form."
    return {"data": data} | ({"files": {"image": image}} if image else {})

def body(content: bytes, media_type: str) -> dict[str, Any]:
    "The options of a request with a raw body."
    return {"content": content, "headers": {"Content-Type": media_type}}

LATIN = "designation=été".encode("latin-1")
CUT = b'--b\r\nContent-Disposition: form-data; name="designation"\r\n\r\nJeu\r\n'
REFUSED: dict[str, tuple[int, str, Callable[[], dict[str, Any]]]] = {
    "nothing": (422, "a title or a picture", dict),
    "a description alone": (422, "a title or a picture", lambda: form(description="Un jeu de société")),
    "a title of 1 MB": (413, "designation and description", lambda: form(designation="x" * 2**20)),
    "text too long together": (413, "found 300,000",
                               lambda: form(designation="x" * 150_000, description="x" * 150_000)),
    "an upload of 30 MB": (413, "10 MiB",
                           lambda: form(("a.jpg", b"\xff\xd8\xff" + b"x" * 30_000_000), designation="Jeu")),
    "text named .jpg": (422, "not a JPEG, PNG or WebP",
                        lambda: form(("a.jpg", b"Bonjour", "image/jpeg"), designation="Jeu")),
    "a truncated picture": (422, "truncated", lambda: form(("a.jpg", truncated()), designation="Jeu")),
    "40,000 × 40,000": (422, "40000×40000", lambda: form(("a.png", bomb()))),
    "a GIF": (422, "not a JPEG, PNG or WebP", lambda: form(("a.gif", picture(16, "GIF")))),
    "NUL in the title": (422, "designation: expected no NUL", lambda: form(designation="Jeu\0x")),
    "NUL in an id": (422, "product_id: expected no NUL", lambda: form(designation="Jeu", product_id="\0")),
    "Latin-1": (422, "designation: expected UTF-8", lambda: body(LATIN, "application/x-www-form-urlencoded")),
    "a field twice": (422, "designation: expected once", lambda: form(designation=["Jeu", "Jouet"])),
    "an unknown field": (422, "'title'", lambda: form(title="Jeu")),
    "JSON": (415, "application/json", lambda: {"json": {"designation": "Jeu"}}),
    "a form cut off": (400, "cut off", lambda: body(CUT, "multipart/form-data; boundary=b")),
}

@pytest.mark.parametrize("case", REFUSED)
def test_answers_a_bad_request_with_a_problem_document(case: str, api: ApiProcess, marie: dict[str, str]) -> None:
    status, detail, make = REFUSED[case]
    options = make()
    response = api.client.post("/predict", **options | {"headers": options.get("headers", {}) | marie})
    assert detail in problem(response, status)["detail"]
    assert api.predict(marie, "Jeu").status_code == 200, "the service goes on"

def test_checks_the_token_before_it_reads_the_body(api: ApiProcess) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2000): yield b"x" * 65536
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    problem(api.client.post("/predict", content=endless(), headers=headers), 401)

ODD_PICTURES: dict[str, Callable[[Image.Image], bytes]] = {
    "CMYK": lambda i: encoded(i.convert("CMYK"), "JPEG"), "16-bit": sixteen_bit, "turned": turned,
    "animated": lambda i: encoded(i, "WEBP", save_all=True, append_images=[i.rotate(90)], lossless=True),
    "animated PNG": lambda i: encoded(i, "PNG", save_all=True, append_images=[i.rotate(90)]),
    "one pixel": lambda i: encoded(i.resize((1, 1)), "PNG"), "palette": lambda i: encoded(i.convert("P"), "PNG"),
}

@pytest.mark.parametrize("kind", ODD_PICTURES)
def test_accepts_cmyk_16_bit_animated_and_tiny_pictures(kind: str, api: ApiProcess, marie: dict[str, str]) -> None:
    raw = ODD_PICTURES[kind](Image.open(BytesIO(picture(80))))
    assert api.predict(marie, picture=raw).status_code == 200

def stored(api: ApiProcess, request_id: str) -> dict[str, Any]:
    "The row of a prediction in the store; empty if there is none yet."
    store = api.store()
    try:
        query = sa.select(predictions).where(predictions.c.request_id == request_id)
        with store.reading() as c: row = c.execute(query).mappings().first()
        return dict(row) if row else {}
    finally: store.close()

def test_accepts_and_stores_any_text_of_a_merchant(api: ApiProcess, marie: dict[str, str]) -> None:
    fields = dict.fromkeys(("designation", "description", "product_identifier", "product_id", "imageid"), STRANGE)
    file = ("../../../etc/passwd\u202e.exe", picture(), "text/html")
    for options in ({"data": fields}, {"data": fields, "files": {"image": file}}):
        response = api.client.post("/predict", headers=marie, **options)
        assert response.status_code == 200, response.text
        deadline = time.monotonic() + 20
        while not (row := stored(api, response.json()["request_id"])) and time.monotonic() < deadline: time.sleep(0.05)
        assert row["product_id"] == STRANGE and len(row["profile"]) == 8 and row["user"] == "marie"

# --- log-in, scopes and limits

def test_log_in_gives_a_token_with_the_scopes_of_the_role(api: ApiProcess) -> None:
    form = {"username": "rose", "password": PASSWORD, "grant_type": "password"}
    response = api.client.post("/token", data=form)
    assert response.json()["token_type"] == "bearer" and response.json()["scope"] == "predict jobs feedback review"
    assert response.headers["cache-control"] == "no-store"
    claims = jwt.decode(response.json()["access_token"], KEY, ["HS256"])
    assert claims["sub"] == "rose" and claims["exp"] - claims["iat"] == response.json()["expires_in"]

def test_log_in_refuses_a_wrong_form(api: ApiProcess) -> None:
    good = {"username": "marie", "password": PASSWORD}
    problem(api.client.post("/token", data=good | {"scope": "admin"}), 400)
    problem(api.client.post("/token", json=good), 415)
    problem(api.client.post("/token", data={"username": "marie"}), 422)
    problem(api.client.post("/token", data=good | {"password": "x" * 20_000}), 413)
    too_long = {"username": "long", "password": "x" * 73}
    assert "72 bytes" in problem(api.client.post("/token", data=too_long), 401)["detail"]

def test_limits_failed_logins_by_user_and_address(api: ApiProcess) -> None:
    guess = lambda name: api.client.post("/token", data={"username": name, "password": "wrong"})
    assert [guess("victor").status_code for _ in range(6)] == [401] * 5 + [429]
    response = guess("victor")
    assert "log-ins" in problem(response, 429)["detail"] and 1 <= int(response.headers["retry-after"]) <= 60
    assert guess("hugo").status_code == 401 and api.token("marie"), "other users are not affected"

def test_a_route_requires_its_scope(api: ApiProcess) -> None:
    only_feedback = api.token("marie", scope="feedback")
    problem(api.predict(only_feedback, "Jeu"), 403)
    problem(api.client.post("/model/reload", headers=api.token("rose")), 403)
    problem(api.client.post("/model/reload", headers=api.token("root", scope="predict")), 403)
    assert api.client.get("/model", headers=only_feedback).status_code == 200

def test_a_disabled_user_loses_access_within_fifteen_seconds(api: ApiProcess) -> None:
    api.add_users(denis="user")
    denis, store = api.token("denis"), api.store()
    assert api.predict(denis, "Jeu").status_code == 200
    change_user(store, "denis", disabled=True)
    began = time.monotonic()
    while api.predict(denis, "Jeu").status_code == 200:
        assert time.monotonic() - began < 15
        time.sleep(0.2)
    problem(api.predict(denis, "Jeu"), 401)
    problem(api.client.post("/token", data={"username": "denis", "password": PASSWORD}), 401)
    change_user(store, "denis", disabled=False)
    api.token("denis")
    store.close()
    time.sleep(10.5) # until the cached entry of the user has expired
    problem(api.predict(denis, "Jeu"), 401)

def test_the_rate_limit_is_counted_for_each_user(own_api: ApiProcess) -> None:
    own_api.env["RAKUTEN_RATE_LIMIT_PREDICT"] = "3/minute"
    own_api.start().add_users(paul="user", anna="user")
    paul, anna = own_api.token("paul"), own_api.token("anna")
    paths = ("/predict", "/predict_code", "/predict", "/predict_code")
    responses = [own_api.client.post(path, data={"designation": "Jeu"}, headers=paul) for path in paths]
    assert [r.status_code for r in responses] == [200, 200, 200, 429]
    assert [r.headers["ratelimit-remaining"] for r in responses] == ["2", "1", "0", "0"]
    assert 1 <= int(responses[3].headers["retry-after"]) <= 60 and responses[3].headers["ratelimit-limit"] == "3"
    problem(responses[3], 429)
    assert own_api.predict(anna, "Jeu").status_code == 200
    probes = ("/status", "/health", "/ready", "/metrics")
    assert all(own_api.client.get(path).status_code == 200 for path in probes for _ in range(10))

# --- log, metrics, headers and documentation

def test_logs_one_line_without_secrets_for_each_request(api: ApiProcess) -> None:
    header = api.token("marie")
    fields = {"designation": "un titre confidentiel", "description": "secret"}
    response = api.client.post("/predict?token=in-the-query", data=fields, files={"image": picture()},
                               headers=header | {"X-Request-ID": "order-4711"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "order-4711"
    lines = [json.loads(line) for line in api.log().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "order-4711"]
    expected = {"method": "POST", "path": "/predict", "status": 200, "user": "marie",
                "model_version": response.json()["model_version"]}
    assert {key: line[key] for key in expected} == expected
    assert line["seconds"] > 0
    for secret in ("confidentiel", "in-the-query", PASSWORD, KEY, header["Authorization"].split(".")[1]):
        assert secret not in api.log() + api.terminal()

def test_replaces_a_harmful_request_id(api: ApiProcess) -> None:
    for given in ("a b", "x" * 65, '"}{', "é"):
        response = api.client.get("/status", headers={"X-Request-ID": given.encode()})
        assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])

def test_metrics_have_the_names_of_the_contract(api: ApiProcess, marie: dict[str, str]) -> None:
    version = api.predict(marie, "Jeu", picture=picture()).json()["model_version"]
    text = api.client.get("/metrics").text
    for name in ("http_requests_total{", "http_request_duration_seconds_bucket{", "rakuten_predictions_total{code=",
                 "rakuten_confidence_bucket{", "rakuten_review_total ", 'rakuten_expert_total{expert="image"}',
                 "rakuten_inference_seconds_count ", "rakuten_decode_seconds_count ",
                 f'rakuten_model_info{{model_version="{version}"}} 1.0'):
        assert name in text
    assert "process_resident_memory_bytes" in text

def test_every_response_has_security_headers(api: ApiProcess) -> None:
    for path in ("/status", "/nowhere", "/predict"):
        headers = api.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"

def test_the_documentation_page_loads_from_this_host_only(api: ApiProcess) -> None:
    page = api.client.get("/docs")
    assert page.status_code == 200 and "//" not in page.text, "no address of another host, with or without a scheme"
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert len(links) == 3 and all(link.startswith("/") for link in links)
    files = {link: api.client.get(link) for link in links}
    assert {link: r.status_code for link, r in files.items()} == dict.fromkeys(links, 200)
    types = sorted(r.headers["content-type"].split(";")[0] for r in files.values())
    assert types[:2] == ["image/png", "text/css"] and types[2].endswith("javascript")
    policy = {d.split()[0]: d.split()[1:] for d in page.headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'none'"] and policy["connect-src"] == ["'self'"]
    allowed = {source for sources in policy.values() for source in sources}
    assert allowed <= {"'none'", "'self'", "'unsafe-inline'", "data:"}
    problem(api.client.get("/docs/redoc.standalone.js"), 404)

def test_answers_an_unknown_address_or_method(api: ApiProcess) -> None:
    problem(api.client.get("/predicts"), 404)
    response = api.client.get("/predict")
    problem(response, 405)
    assert response.headers["allow"] == "POST"

def test_the_openapi_document_describes_every_route(api: ApiProcess) -> None:
    document = api.client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/token", "/status", "/health", "/ready", "/predict", "/predict_code", "/model", "/model/reload", "/metrics",
        "/model/promote", "/model/rollback", "/experiment", "/drift",
        "/jobs", "/jobs/{id}", "/jobs/{id}/predictions.csv", "/jobs/{id}/predictions.parquet",
        "/review", "/review/{id}/picture", "/review/{id}/explanation", "/feedback", "/feedback/{request_id}"}
    post = document["paths"]["/predict"]["post"]
    responses = post["responses"]
    assert {"200", "401", "413", "415", "422", "429", "503"} <= set(responses) and post["security"]
    assert all(list(responses[s]["content"]) == ["application/problem+json"] for s in responses if s != "200")
    fields = post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    ids = {"product_identifier", "product_id", "imageid"}
    assert set(fields) == ids | {"designation", "description", "image", "explain"}
    assert fields["designation"]["examples"]
    scheme = document["components"]["securitySchemes"]["OAuth2PasswordBearer"]
    assert scheme["flows"]["password"]["tokenUrl"] == "token"

# --- start, reload and stop

def test_is_ready_once_a_model_appears(own_api: ApiProcess) -> None:
    (own_api.home / "bundle").rename(own_api.home / "later")
    own_api.start().add_users(marie="user", root="admin")
    problem(own_api.client.get("/ready"), 503)
    response = own_api.predict(own_api.token(), "Jeu")
    problem(response, 503)
    assert response.headers["retry-after"]
    assert own_api.client.get("/health").status_code == 200
    (own_api.home / "later").rename(own_api.home / "bundle")
    own_api.wait_until("/ready", {200})

def reload(api: ApiProcess, admin: dict[str, str]) -> dict[str, Any]:
    "Ask for a reload and return the model once its outcome is reported."
    requested = api.client.post("/model/reload", headers=admin)
    assert requested.status_code == 202
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        model: dict[str, Any] = api.client.get("/model", headers=admin).json()
        if model["request"] == requested.json()["request"] and model["followed"]: return model
        time.sleep(0.1)
    raise AssertionError("no outcome of the reload within 15 s")

def flip_a_byte(path: Path) -> None:
    "Change one bit in the middle of a file."
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)

def test_serves_the_old_model_if_the_new_bundle_is_damaged(own_api: ApiProcess) -> None:
    own_api.start().add_users(root="admin")
    admin = own_api.token("root")
    version = own_api.client.get("/status").json()["model_version"]
    flip_a_byte(own_api.home / "bundle/experts/image/backbone.onnx")
    model = reload(own_api, admin)
    assert model["model_version"] == version
    assert "experts/image/backbone.onnx: differs" in model["followed"][0]["error"]
    assert str(own_api.home) not in json.dumps(model)
    assert own_api.predict(admin, "Jeu", picture=picture()).json()["model_version"] == version
    assert own_api.client.get("/ready").status_code == 200
    own_api.stop()
    own_api.start()
    assert own_api.client.get("/status").json()["model_version"] == version, "after a restart, from the copy"

def test_no_request_fails_while_the_bundle_is_replaced(own_api: ApiProcess, sample_catalog: Path, rakuten: Any) -> None:
    own_api.start().add_users(root="admin")
    admin, raw, statuses, stop = own_api.token("root"), picture(), [], threading.Event()
    def ask() -> None:
        with httpx.Client(base_url=own_api.url, timeout=60, headers=admin) as client:
            while not stop.is_set():
                response = client.post("/predict", data={"designation": "Jeu"}, files={"image": raw})
                statuses.append(response.status_code)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads: thread.start()
    before = own_api.client.get("/status").json()["model_version"]
    shutil.rmtree(own_api.home / "bundle") # as DVC does before it runs a stage again
    time.sleep(0.5)
    trained = rakuten("train", sample_catalog, "--bundle", own_api.home / "bundle", "--experts", "text_linear")
    assert trained.returncode == 0, trained.stderr
    model = reload(own_api, admin)
    time.sleep(0.3)
    stop.set()
    for thread in threads: thread.join()
    assert model["model_version"] != before and not model["error"]
    assert len(statuses) > 10 and set(statuses) == {200}

def test_sigterm_lets_open_requests_finish(own_api: ApiProcess) -> None:
    own_api.start().add_users(marie="user")
    header, raw, responses = own_api.token(), picture(1500, "PNG"), []
    def ask(n: int) -> None:
        options: dict[str, Any] = {"data": {"product_id": str(n)}, "files": {"image": raw}, "headers": header}
        responses.append(httpx.post(f"{own_api.url}/predict", timeout=60, **options))
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads: thread.start()
    while 'handler="/predict"' not in own_api.client.get("/metrics").text and not responses: time.sleep(0.01)
    own_api.stop(signal.SIGTERM)
    for thread in threads: thread.join()
    assert [r.status_code for r in responses] == [200] * 8
    assert all(stored(own_api, r.json()["request_id"]) for r in responses), "their predictions are stored"

def test_two_processes_create_the_store_at_once(own_api: ApiProcess, env: dict[str, str]) -> None:
    other = ApiProcess(env, own_api.home, own_api.home / "bundle")
    for process in (own_api, other): process.start(wait=False)
    for process in (own_api, other): process.wait_until("/ready", {200})
    own_api.add_users(marie="user")
    assert other.predict(own_api.token(), "Jeu").status_code == 200, "both know the same users"
    other.__exit__()

def test_the_command_line_serves(own_api: ApiProcess) -> None:
    port = free_port()
    bundle = str(own_api.home / "bundle")
    command = [sys.executable, "-m", "rakuten_nb.cli", "serve", "--bundle", bundle, "--port", str(port)]
    with subprocess.Popen(command, env=own_api.env, cwd=own_api.home, stderr=subprocess.PIPE, text=True) as process:
        own_api.process = process # type: ignore[assignment]
        own_api.client = httpx.Client(base_url=f"http://127.0.0.1:{port}")
        (own_api.home / "terminal.log").touch()
        own_api.wait_until("/ready", {200})
        process.send_signal(signal.SIGTERM)
        terminal = process.communicate(timeout=60)[1]
    assert "users add NAME" in terminal and f"http://127.0.0.1:{port}/docs" in terminal and "Traceback" not in terminal
    assert (own_api.home / "logs/serving_logger.log").exists()

def test_cuts_off_an_endless_header(api: ApiProcess) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=30) as connection, pytest.raises(OSError):
        connection.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\nX: ")
        for _ in range(1000): connection.sendall(b"a" * 65536)
    assert api.client.get("/status").status_code == 200

def test_large_pictures_fit_into_the_memory_of_a_container(own_api: ApiProcess) -> None:
    own_api.start().add_users(marie="user")
    header, large = own_api.token(), encoded(Image.new("RGBA", (7000, 7000)), "PNG")
    statuses: list[int] = []
    def ask() -> None:
        response = httpx.post(f"{own_api.url}/predict", files={"image": large}, headers=header, timeout=120)
        statuses.append(response.status_code)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads: thread.start()
    time.sleep(0.3) # until they have arrived; each takes a second
    small = own_api.predict(header, "Jeu", picture=picture())
    assert small.status_code == 200 and not statuses, "a small picture does not wait for them"
    for thread in threads: thread.join()
    assert own_api.process and statuses == [200] * 3
    assert memory_mb(own_api.process.pid) < 900, "compose.yaml gives it 1 GiB"

# --- invalid settings and commands

def test_does_not_start_without_a_key(own_api: ApiProcess) -> None:
    own_api.env.pop("SECRET_KEY")
    own_api.start(wait=False)
    assert own_api.process and own_api.process.wait(60) != 0
    lines = [line for line in own_api.terminal().splitlines() if "SECRET_KEY" in line]
    assert len(lines) == 1 and "secrets.token_urlsafe" in lines[0] and "Traceback" not in own_api.terminal()

BAD_SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "an invalid limit": ({"RAKUTEN_RATE_LIMIT_PREDICT": "often"}, "such as 10/minute"),
    "no algorithm": ({"ALGORITHM": "none"}, "ALGORITHM"),
    "a short key": ({"SECRET_KEY": "short"}, "SECRET_KEY: expected 32"),
    "no database": ({"RAKUTEN_DATABASE_URL": "nonsense"}, "RAKUTEN_DATABASE_URL: expected sqlite:///FILE"),
    "no Redis": ({"RAKUTEN_REDIS_URL": "redis://:hush@localhost:abc/0"}, "RAKUTEN_REDIS_URL: expected redis://"),
    "an endless token": ({"ACCESS_TOKEN_EXPIRE_MINUTES": "-1"}, "ACCESS_TOKEN_EXPIRE_MINUTES"),
}
# Starts the server once for each setting, in one process: an import of the service costs two seconds.
START_EACH = """
import json, os, sys
import uvicorn
from rakuten_nb.serving.api import create_app
environment = dict(os.environ)
for case, settings in json.loads(sys.argv[1]).items():
    os.environ.clear()
    os.environ.update(environment | settings)
    print(f"--- {case}", file=sys.stderr, flush=True)
    code: object = 0
    try: uvicorn.run(create_app(), host="127.0.0.1", port=int(sys.argv[2]))
    except SystemExit as e: code = e.code
    print(f"exit code {code}", file=sys.stderr, flush=True)
"""

@pytest.fixture(scope="module")
def refused_starts(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> dict[str, str]:
    "Case → what the server prints when it starts with a bad setting."
    api = ApiProcess(env, tmp_path_factory.mktemp("refused"), bundle)
    cases = json.dumps({case: settings for case, (settings, _) in BAD_SETTINGS.items()})
    command = [sys.executable, "-c", START_EACH, cases, str(api.port)]
    run = subprocess.run(command, env=api.env, cwd=api.home, capture_output=True, text=True, timeout=120, check=True)
    parts = run.stderr.split("--- ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}

@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_refused_in_one_line(case: str, refused_starts: dict[str, str]) -> None:
    terminal, reason = refused_starts[case], BAD_SETTINGS[case][1]
    assert terminal.rstrip().splitlines()[-1].startswith("exit code ") and not terminal.rstrip().endswith("exit code 0")
    lines = [line for line in terminal.splitlines() if reason in line]
    assert len(lines) == 1 and "Traceback" not in terminal and "hush" not in terminal

BAD_COMMANDS: list[tuple[list[str], bytes, str]] = [
    (["users", "add", "bob", "--password-stdin"], b"\xff\xfe not UTF-8", "expected UTF-8"),
    (["users", "add", "bob", "--password-stdin"], b"two\nlines\n", "expected one line"),
    (["users", "add", "bob"], b"", "--password-stdin"),
    (["users", "add", "marie", "--password-stdin"], b"long enough", "already exists"),
    (["users", "add", "-x", "--role", "king"], b"", ""),
    (["users", "disable", "nobody"], b"", "not found"),
]

def test_the_command_line_refuses_bad_input(api: ApiProcess) -> None:
    for words, typed, reason in [(["serve", "--port", str(api.port)], b"", "cannot listen there"), *BAD_COMMANDS]:
        command = [sys.executable, "-m", "rakuten_nb.cli", *words]
        run = subprocess.run(command, input=typed, env=api.env, cwd=api.home, capture_output=True, check=False)
        assert run.returncode == 2 and reason in run.stderr.decode() and b"Traceback" not in run.stderr, words
