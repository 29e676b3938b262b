"The API follows its OpenAPI document under thousands of generated requests, mutated pictures and mutated forms."
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api_process import USERS, ApiProcess, memory_mb
from contract_hooks import EXAMPLE_JOB, EXAMPLE_MODEL, KNOWN
from hard_products import encoded, sixteen_bit, turned
from PIL import Image

from rakuten_nb.config import Settings
from rakuten_nb.data.catalog import Product
from rakuten_nb.models.bundle import Prediction
from rakuten_nb.store.database import Store, utc_now
from rakuten_nb.store.drift_reports import add_drift_report
from rakuten_nb.store.job_files import KINDS, answers_path, job_folder
from rakuten_nb.store.jobs import add_job, end_job, find_jobs
from rakuten_nb.store.prediction_log import add_predictions, prediction_columns
from rakuten_nb.store.products import product_columns

pytestmark = pytest.mark.services

SEED = 20240229
GENERATED, MUTATED = 2000, 2000 # at least; exactly
MAX_MEMORY_MB = 800

# Checks of schemathesis that no form can pass; all others run.
EXCLUDED = {
    "positive_data_acceptance": "no JSON schema expresses `a title or a picture` or the bytes of a picture: 422",
    "negative_data_rejection": "a form has strings only: a number or null as title arrives as the title `7` or `null`",
}
EXAMPLES = 160 # for each operation at most; an operation without a body or parameters has only a few

@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API whose tokens and limits last longer than the test."
    lasting = {"ACCESS_TOKEN_EXPIRE_MINUTES": "120", "RAKUTEN_RATE_LIMIT_PREDICT": "1000000/minute"}
    with ApiProcess(env, tmp_path_factory.mktemp("contract"), bundle, **lasting) as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def admin(target: ApiProcess) -> dict[str, str]:
    "The header of an administrator, taken before generated log-ins exhaust the throttle of this address."
    return target.token("root")

def check_health(api: ApiProcess, admin: dict[str, str]) -> None:
    "The process runs, answers a good request, uses little memory and logged no internal error."
    assert api.process and api.process.poll() is None, api.terminal()
    response = api.predict(admin, "Piscine hors sol ronde", picture=pictures()["JPEG"])
    assert response.status_code == 200 and len(response.json()["predictions"]) == 5
    assert memory_mb(api.process.pid) < MAX_MEMORY_MB
    assert "internal error" not in api.log() and "Traceback" not in api.terminal()

# --- requests generated from the OpenAPI document

EXAMPLE_ITEM = 812 # the id in the document

def add_examples(store: Store, data_dir: Path) -> None:
    "Add a product that needs review, and one for feedback."
    answer = Prediction(10, "Livres", "Books", 0.4, True, [(10, 0.4), (2705, 0.3)], {"text_linear": 1.0})
    for number, about in ((EXAMPLE_ITEM, {"request_id": "r", "product_id": ""}), (EXAMPLE_ITEM + 1, KNOWN)):
        product = Product(f"Piscine {number}", "", pictures()["JPEG"], about["product_id"])
        columns = prediction_columns(answer, product, request_id=about["request_id"], at=utc_now(), user="marie",
                                     model_version="0" * 12)
        add_predictions(store, [columns | {"id": number}], [product_columns(data_dir, product, columns["at"])])

@contextmanager
def examples(api: ApiProcess) -> Iterator[None]:
    "The job and the predictions that the document names; the job is created again whenever a request deletes it."
    store, stop = api.store(), threading.Event()
    settings = Settings(rakuten_data_dir=api.home / "data")
    add_examples(store, settings.rakuten_data_dir)
    add_drift_report(store, {"rows": 300, "model_version": EXAMPLE_MODEL, "drift": False, "comparisons": []})
    (settings.rakuten_data_dir / "models" / EXAMPLE_MODEL).mkdir(parents=True) # cannot be loaded: the champion stays
    def recreate() -> None:
        while not stop.wait(0.05):
            if find_jobs(store, job=EXAMPLE_JOB): continue
            job_folder(settings, EXAMPLE_JOB).mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError): # deleted at this moment: create it in the next round
                for kind in KINDS: answers_path(settings, EXAMPLE_JOB, kind).write_text("productid\n", encoding="utf-8")
            add_job(store, EXAMPLE_JOB, "root", [1])
            end_job(store, EXAMPLE_JOB, "succeeded")
    thread = threading.Thread(target=recreate)
    thread.start()
    try: yield
    finally:
        stop.set()
        thread.join()
        store.close()

def read_statuses(events: Path) -> dict[str, Counter[int]]:
    "Operation → number of responses by status, from the report of schemathesis."
    statuses: dict[str, Counter[int]] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for interaction in recorder.get("interactions", {}).values():
            if response := interaction["response"]:
                statuses.setdefault(recorder["label"], Counter())[response["status_code"]] += 1
    return statuses

def test_every_operation_conforms_to_the_openapi_document(
    target: ApiProcess, admin: dict[str, str], tmp_path: Path,
) -> None:
    reports = {"json": tmp_path / "report.json", "ndjson": tmp_path / "events.ndjson"}
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{target.url}/openapi.json",
               "--header", f"Authorization: {admin['Authorization']}", "--phases", "examples,coverage,fuzzing",
               "--max-examples", str(EXAMPLES), "--seed", str(SEED), "--generation-database", "none",
               "--checks", "all", "--exclude-checks", ",".join(EXCLUDED), "--request-timeout", "10", "--no-color",
               "--report", ",".join(reports), *(f"--report-{kind}-path={path}" for kind, path in reports.items())]
    python_path = os.pathsep.join([target.env["PYTHONPATH"], str(Path(__file__).parent)])
    env = target.env | {"SCHEMATHESIS_HOOKS": "contract_hooks", "PYTHONPATH": python_path, "CONTRACT_URL": target.url,
                        "CONTRACT_AUTHORIZATION": admin["Authorization"]}
    with examples(target):
        run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False)
    output = run.stdout[-8000:] + run.stderr[-2000:]
    assert run.returncode == 0, output
    report = json.loads(reports["json"].read_text(encoding="utf-8"))
    paths = target.client.get("/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    statuses = read_statuses(reports["ndjson"])
    counted = sum(c.total() for c in statuses.values())
    print(f"{counted} responses to {report['test_cases']['generated']} generated requests:",
          {name: dict(sorted(c.items())) for name, c in sorted(statuses.items())})
    assert report["complete"] and report["seed"] == SEED and report["errors"] == [] and report["failures"] == []
    tested = {k: report["operations"][k] for k in ("total", "selected", "tested", "skipped", "errored")}
    n = len(operations)
    assert tested == {"total": n, "selected": n, "tested": n, "skipped": 0, "errored": 0}
    assert set(statuses) == operations, output
    assert report["test_cases"]["generated"] >= GENERATED and counted >= GENERATED, output
    refused_all = {"POST /token"} # no generated password is right
    never = [name for name in operations - refused_all if not statuses[name].keys() & {200, 201, 202, 204}]
    assert never == [], "every operation succeeds at least once"
    check_health(target, admin)

# --- mutated pictures and forms

def pictures() -> dict[str, bytes]:
    "Pictures of all accepted kinds, and one of a refused kind."
    rng = np.random.default_rng(SEED)
    blocks = np.kron(rng.integers(0, 255, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    image = Image.fromarray(blocks)
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)], "duration": 50}
    return {"JPEG": encoded(image, "JPEG"), "progressive": encoded(image, "JPEG", progressive=True),
            "turned": turned(image), "CMYK": encoded(image.convert("CMYK"), "JPEG"), "PNG": encoded(image, "PNG"),
            "palette": encoded(image.convert("P"), "PNG"), "16-bit": sixteen_bit(image),
            "animated PNG": encoded(image, "PNG", **frames), "WebP": encoded(image, "WEBP"),
            "lossless": encoded(image, "WEBP", lossless=True), "animated": encoded(image, "WEBP", **frames),
            "GIF": encoded(image, "GIF", **frames)}

Rng = np.random.Generator

def flip(rng: Rng, raw: bytes) -> bytes:
    "Replace some bytes."
    out = np.frombuffer(raw, np.uint8).copy()
    where = rng.integers(0, len(out), rng.integers(1, 24))
    out[where] = rng.integers(0, 256, len(where))
    return out.tobytes()

def flip_bit(rng: Rng, raw: bytes) -> bytes:
    "Change one bit."
    out = bytearray(raw)
    out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)

def cut(rng: Rng, raw: bytes) -> bytes:
    "Remove the end."
    return raw[: rng.integers(1, len(raw))]

def cut_out(rng: Rng, raw: bytes) -> bytes:
    "Remove a piece in the middle."
    a, b = sorted(rng.integers(0, len(raw) + 1, 2))
    return raw[:a] + raw[b:]

def insert(rng: Rng, raw: bytes) -> bytes:
    "Insert random bytes."
    at = int(rng.integers(0, len(raw) + 1))
    return raw[:at] + rng.bytes(int(rng.integers(1, 200))) + raw[at:]

def repeat(rng: Rng, raw: bytes) -> bytes:
    "Repeat a piece."
    a, b = sorted(rng.integers(0, len(raw) + 1, 2))
    return raw[:b] + raw[a:]

def behead(rng: Rng, raw: bytes) -> bytes:
    "Replace the first bytes."
    n = int(rng.integers(2, 64))
    return rng.bytes(n) + raw[n:]

def exaggerate(rng: Rng, raw: bytes) -> bytes:
    "Replace a number near the beginning by an extreme value."
    at, size = int(rng.integers(0, min(len(raw), 160))), int(rng.choice([1, 2, 4]))
    return raw[:at] + [b"\xff", b"\x00", b"\x7f", b"\x80"][rng.integers(4)] * size + raw[at + size:]

Mutation = Callable[[Rng, bytes], bytes]
MUTATIONS: tuple[Mutation, ...] = (flip, flip_bit, cut, cut_out, insert, repeat, behead, exaggerate)

def mutated(rng: Rng, raw: bytes) -> bytes:
    "Apply one mutation, sometimes two or three."
    for _ in range(rng.choice([1, 1, 1, 2, 3])): raw = MUTATIONS[rng.integers(len(MUTATIONS))](rng, raw or b"\0")
    return raw

BOUNDARY = "a-boundary-of-the-tests"
MULTIPART, URLENCODED = f"multipart/form-data; boundary={BOUNDARY}", "application/x-www-form-urlencoded"
FIELDS = {"designation": "Été à l'eau 🎁", "description": "<p>Piscine & pompe</p>", "product_identifier": "0",
          "product_id": "3804725264", "imageid": "1263597046"}

def multipart(fields: dict[str, str], picture: bytes | None) -> bytes:
    "A form as a browser sends it."
    out, part = BytesIO(), f"--{BOUNDARY}\r\nContent-Disposition: form-data"
    for name, value in fields.items(): out.write(f'{part}; name="{name}"\r\n\r\n{value}\r\n'.encode())
    if picture is not None:
        out.write(f'{part}; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'.encode())
        out.write(picture + b"\r\n")
    out.write(f"--{BOUNDARY}--\r\n".encode())
    return out.getvalue()

def printable(rng: Rng, kind: str) -> str:
    "A mutated value of a header, with characters that HTTP permits."
    raw = mutated(rng, kind.encode())
    return "".join(chr(b) if 32 <= b < 127 or b >= 160 else "\t;,=\"'"[b % 6] for b in raw).strip() or "x"

STRANGE_KINDS = (
    "", "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary="',
    "multipart/form-data; boundary=" + "b" * 300, "multipart/form-data; boundary=\xe9\xff",
    "multipart/mixed; boundary=a",
    "MULTIPART/FORM-DATA; BOUNDARY=" + BOUNDARY, "application/json", f"{MULTIPART}; charset=utf-16",
    f"{URLENCODED}; charset=latin-1", f"{URLENCODED}; charset=\xff", f"{MULTIPART}; boundary=another",
    "text/plain; ;;;==", "/", ";")

def picture_form(rng: Rng, originals: list[bytes]) -> tuple[bytes, str]: # body, Content-Type
    "A form with a mutated picture."
    raw = originals[rng.integers(len(originals))]
    spliced = raw[: len(raw) // 2] + originals[rng.integers(len(originals))][len(raw) // 2:]
    fields = FIELDS if rng.random() < 0.5 else {}
    return multipart(fields, spliced if rng.random() < 0.1 else mutated(rng, raw)), MULTIPART

def mutated_form(rng: Rng, originals: list[bytes]) -> tuple[bytes, str]: # body, Content-Type
    "A form with a mutated body, boundary or media type."
    chosen = {name: FIELDS[name] for name in FIELDS if rng.random() < 0.7}
    if rng.random() < 0.4:
        body, kind = str(httpx.QueryParams(chosen)).encode() or b"&", URLENCODED
    else:
        picture = originals[rng.integers(len(originals))] if rng.random() < 0.5 else None
        body, kind = multipart(chosen, picture), MULTIPART
    part = rng.random() # below 0.6 the body, above 0.5 the header
    if part < 0.6: body = mutated(rng, body)
    if part > 0.5:
        kind = printable(rng, kind) if rng.random() < 0.6 else STRANGE_KINDS[rng.integers(len(STRANGE_KINDS))]
    return body, kind

def check_response(response: httpx.Response, case: str) -> None:
    "The response has five predictions or is a problem document."
    assert response.status_code in (200, 400, 413, 415, 422), case
    if response.status_code == 200: assert len(response.json()["predictions"]) == 5, case
    else:
        assert response.headers["content-type"] == "application/problem+json", case
        document = response.json()
        assert set(document) == {"type", "title", "status", "detail", "request_id"}, case
        assert document["status"] == response.status_code, case
        assert document["detail"] and "\n" not in document["detail"] and "Traceback" not in response.text, case

def test_a_mutated_picture_or_form_gets_a_prediction_or_a_problem(target: ApiProcess, admin: dict[str, str]) -> None:
    rng, originals, token = np.random.default_rng(SEED), list(pictures().values()), admin["Authorization"].encode()
    statuses: dict[str, Counter[int]] = {"pictures": Counter(), "forms": Counter()}
    for n in range(MUTATED):
        mutation, make = ("forms", mutated_form) if n % 2 else ("pictures", picture_form)
        content, kind = make(rng, originals)
        route = "/predict" if n % 3 else "/predict_code"
        headers = [(b"Authorization", token), (b"Content-Type", kind.encode("latin-1"))]
        response = target.client.post(route, content=content, headers=headers)
        statuses[mutation][response.status_code] += 1
        request = f"{mutation} {n}, {kind!r}, {len(content)} bytes {content[:300]!r}"
        check_response(response, f"{request}: {response.status_code} {response.text[:500]}")
    print({mutation: dict(sorted(c.items())) for mutation, c in statuses.items()})
    assert sum(c.total() for c in statuses.values()) == MUTATED
    for mutation, expected in {"pictures": (200, 422), "forms": (200, 400, 415, 422)}.items():
        counts = statuses[mutation]
        assert all(counts[status] >= 20 for status in expected), f"{mutation}: too weak or too strong: {counts}"
    check_health(target, admin)
