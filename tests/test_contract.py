"The API keeps to its OpenAPI document whatever it is sent: thousands of generated requests, mutated pictures and mutated forms."
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
from contract_hooks import KNOWN
from hard_products import encoded, sixteen_bit, turned
from PIL import Image

from rakuten_nb.config import Settings
from rakuten_nb.models.bundle import Prediction
from rakuten_nb.store.jobs import add_job, end_job, find_jobs
from rakuten_nb.store.products import ServedProduct, kept_columns, prediction_columns
from rakuten_nb.store.database import Store, add_predictions, utc_now
from rakuten_nb.serving.worker import KINDS, answers_path, job_folder

pytestmark = pytest.mark.services

SEED = 20240229
GENERATED, MUTATED = 2000, 2000 # at least; exactly
MAX_MEMORY_MB = 800

# The checks of schemathesis that no form can pass; all others are made.
EXCLUDED = {
    "positive_data_acceptance": "no JSON schema says `a title or a picture`, nor what makes bytes a picture: such requests are refused, as documented, by 422",
    "negative_data_rejection": "a form holds strings only: a number or null in the place of a title arrives as the title `7` or `null`, and is one",
}
EXAMPLES = 160 # an operation at most; those without a body or parameters have but a few requests that differ

@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API whose tokens and limits outlast the test."
    lasting = {"ACCESS_TOKEN_EXPIRE_MINUTES": "120", "RAKUTEN_RATE_LIMIT_PREDICT": "1000000/minute"}
    with ApiProcess(env, tmp_path_factory.mktemp("contract"), bundle, **lasting) as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def admin(target: ApiProcess) -> dict[str, str]:
    "The header of an admin, from before generated log-ins made the service wary of this address."
    return target.token("root")

def well(api: ApiProcess, admin: dict[str, str]) -> None:
    "It is up, answers a good request, has kept its memory, and nothing broke inside."
    assert api.process and api.process.poll() is None, api.terminal()
    answer = api.predict(admin, "Piscine hors sol ronde", picture=pictures()["JPEG"])
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == 5
    assert memory_mb(api.process.pid) < MAX_MEMORY_MB
    assert "an error of ours" not in api.log() and "Traceback" not in api.terminal()

# --- requests made from the OpenAPI document

EXAMPLE_JOB, EXAMPLE_ITEM = "0123456789abcdef0123456789abcdef", 812 # those that the document names

def add_examples(store: Store, data_dir: Path) -> None:
    "A product that waits for a reviewer, and one that something may be said of."
    answer = Prediction(10, "Livres", "Books", 0.4, True, [(10, 0.4), (2705, 0.3)], {"text_linear": 1.0})
    for number, about in ((EXAMPLE_ITEM, {"request_id": "r", "product_id": ""}), (EXAMPLE_ITEM + 1, KNOWN)):
        product = ServedProduct(f"Piscine {number}", "", "", pictures()["JPEG"], True)
        columns = prediction_columns(answer, product, at=utc_now(), user="marie", model_version="0" * 12, **about)
        add_predictions(store, [columns | {"id": number}], [kept_columns(data_dir, product, columns["at"])])

@contextmanager
def examples(api: ApiProcess) -> Iterator[None]:
    "What the document names: a job that has succeeded, there again whenever it was removed, and two predictions."
    store, stop = api.store(), threading.Event()
    settings = Settings(rakuten_data_dir=api.home / "data")
    add_examples(store, settings.rakuten_data_dir)
    def keep() -> None:
        while not stop.wait(0.05):
            if find_jobs(store, job=EXAMPLE_JOB): continue
            job_folder(settings, EXAMPLE_JOB).mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError): # removed at this very moment: the next time
                for kind in KINDS: answers_path(settings, EXAMPLE_JOB, kind).write_text("productid\n", encoding="utf-8")
            add_job(store, EXAMPLE_JOB, "root", [1])
            end_job(store, EXAMPLE_JOB, "succeeded")
    thread = threading.Thread(target=keep)
    thread.start()
    try: yield
    finally:
        stop.set()
        thread.join()
        store.close()

def cases_of(events: Path) -> dict[str, Counter[int]]:
    "Operation → how many answers of each status, as schemathesis took them down."
    found: dict[str, Counter[int]] = {}
    for line in events.read_text(encoding="utf-8").splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for interaction in recorder.get("interactions", {}).values():
            if answer := interaction["response"]: found.setdefault(recorder["label"], Counter())[answer["status_code"]] += 1
    return found

def test_every_operation_keeps_to_the_document(target: ApiProcess, admin: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{target.url}/openapi.json", "--header", f"Authorization: {admin['Authorization']}",
               "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(SEED), "--generation-database", "none",
               "--checks", "all", "--exclude-checks", ",".join(EXCLUDED), "--request-timeout", "10", "--no-color",
               "--report", "json,ndjson", "--report-json-path", str(tmp_path / "report.json"), "--report-ndjson-path", str(tmp_path / "events.ndjson")]
    hooks = {"SCHEMATHESIS_HOOKS": "contract_hooks", "PYTHONPATH": os.pathsep.join([target.env["PYTHONPATH"], str(Path(__file__).parent)])}
    with examples(target): run = subprocess.run(command, env=target.env | hooks, cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False)
    said = run.stdout[-8000:] + run.stderr[-2000:]
    assert run.returncode == 0, said
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    paths = target.client.get("/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    cases = cases_of(tmp_path / "events.ndjson")
    counted = sum(sum(c.values()) for c in cases.values())
    print(f"{counted} answers to {report['test_cases']['generated']} generated requests:", {name: dict(sorted(c.items())) for name, c in sorted(cases.items())})
    assert report["complete"] and report["seed"] == SEED and report["errors"] == [] and report["failures"] == []
    tested = {k: report["operations"][k] for k in ("total", "selected", "tested", "skipped", "errored")}
    assert tested == {"total": len(operations), "selected": len(operations), "tested": len(operations), "skipped": 0, "errored": 0}
    assert set(cases) == operations and report["test_cases"]["generated"] >= GENERATED and counted >= GENERATED, said
    refused_all = {"POST /token"} # nobody's name and password are guessed
    assert [name for name in operations - refused_all if not cases[name].keys() & {200, 201, 202, 204}] == [], "each did what it is there for, too"
    well(target, admin)

# --- pictures and forms with something wrong in them

def pictures() -> dict[str, bytes]:
    "Pictures of all kinds that are taken, and one that is not."
    rng = np.random.default_rng(SEED)
    image = Image.fromarray(np.kron(rng.integers(0, 255, (6, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))
    frames: dict[str, Any] = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)], "duration": 50}
    return {"JPEG": encoded(image, "JPEG"), "progressive": encoded(image, "JPEG", progressive=True), "turned": turned(image),
            "CMYK": encoded(image.convert("CMYK"), "JPEG"), "PNG": encoded(image, "PNG"), "palette": encoded(image.convert("P"), "PNG"),
            "16-bit": sixteen_bit(image), "animated PNG": encoded(image, "PNG", **frames), "WebP": encoded(image, "WEBP"),
            "lossless": encoded(image, "WEBP", lossless=True), "animated": encoded(image, "WEBP", **frames), "GIF": encoded(image, "GIF", **frames)}

Rng = np.random.Generator

def flip(rng: Rng, raw: bytes) -> bytes:
    "Some bytes become others."
    out = np.frombuffer(raw, np.uint8).copy()
    where = rng.integers(0, len(out), rng.integers(1, 24))
    out[where] = rng.integers(0, 256, len(where))
    return out.tobytes()

def flip_bit(rng: Rng, raw: bytes) -> bytes:
    "One bit is another."
    out = bytearray(raw)
    out[rng.integers(len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)

def cut(rng: Rng, raw: bytes) -> bytes:
    "The end is missing."
    return raw[: rng.integers(1, len(raw))]

def cut_out(rng: Rng, raw: bytes) -> bytes:
    "Something is missing within."
    a, b = sorted(rng.integers(0, len(raw) + 1, 2))
    return raw[:a] + raw[b:]

def insert(rng: Rng, raw: bytes) -> bytes:
    "Something was put in."
    at = int(rng.integers(0, len(raw) + 1))
    return raw[:at] + rng.bytes(int(rng.integers(1, 200))) + raw[at:]

def repeat(rng: Rng, raw: bytes) -> bytes:
    "A piece comes twice."
    a, b = sorted(rng.integers(0, len(raw) + 1, 2))
    return raw[:b] + raw[a:]

def behead(rng: Rng, raw: bytes) -> bytes:
    "Its first bytes mean nothing, or something else."
    n = int(rng.integers(2, 64))
    return rng.bytes(n) + raw[n:]

def exaggerate(rng: Rng, raw: bytes) -> bytes:
    "A number near the beginning is as large, as small or as negative as it can be."
    at, size = int(rng.integers(0, min(len(raw), 160))), int(rng.choice([1, 2, 4]))
    return raw[:at] + [b"\xff", b"\x00", b"\x7f", b"\x80"][rng.integers(4)] * size + raw[at + size:]

MUTATIONS: tuple[Callable[[Rng, bytes], bytes], ...] = (flip, flip_bit, cut, cut_out, insert, repeat, behead, exaggerate)

def mutated(rng: Rng, raw: bytes) -> bytes:
    "One mutation, sometimes two or three of them."
    for _ in range(rng.choice([1, 1, 1, 2, 3])): raw = MUTATIONS[rng.integers(len(MUTATIONS))](rng, raw or b"\0")
    return raw

BOUNDARY = "a-boundary-of-the-tests"
MULTIPART, URLENCODED = f"multipart/form-data; boundary={BOUNDARY}", "application/x-www-form-urlencoded"
FIELDS = {"designation": "Été à l'eau 🎁", "description": "<p>Piscine & pompe</p>", "product_identifier": "0", "product_id": "3804725264",
          "imageid": "1263597046"}

def multipart(fields: dict[str, str], picture: bytes | None) -> bytes:
    "A form as a browser sends it."
    out = BytesIO()
    for name, value in fields.items(): out.write(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode())
    if picture is not None:
        out.write(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'.encode())
        out.write(picture + b"\r\n")
    out.write(f"--{BOUNDARY}--\r\n".encode())
    return out.getvalue()

def printable(rng: Rng, kind: str) -> str:
    "A header's value with something else in it, as far as HTTP lets it through."
    raw = mutated(rng, kind.encode())
    return "".join(chr(b) if 32 <= b < 127 or b >= 160 else "\t;,=\"'"[b % 6] for b in raw).strip() or "x"

STRANGE_KINDS = ("", "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary="', "multipart/form-data; boundary=" + "b" * 300,
                 "multipart/form-data; boundary=\xe9\xff", "multipart/mixed; boundary=a", "MULTIPART/FORM-DATA; BOUNDARY=" + BOUNDARY, "application/json",
                 f"{MULTIPART}; charset=utf-16", f"{URLENCODED}; charset=latin-1", f"{URLENCODED}; charset=\xff", f"{MULTIPART}; boundary=another",
                 "text/plain; ;;;==", "/", ";")

def a_picture(rng: Rng, known: list[bytes]) -> tuple[bytes, str]:
    "A form whose picture is not what it was."
    raw = known[rng.integers(len(known))]
    spliced = raw[: len(raw) // 2] + known[rng.integers(len(known))][len(raw) // 2:]
    return multipart(FIELDS if rng.random() < 0.5 else {}, spliced if rng.random() < 0.1 else mutated(rng, raw)), MULTIPART

def a_form(rng: Rng, known: list[bytes]) -> tuple[bytes, str]:
    "A form whose body, boundary or type is not what it was."
    chosen = {name: FIELDS[name] for name in FIELDS if rng.random() < 0.7}
    if rng.random() < 0.4:
        body, kind = str(httpx.QueryParams(chosen)).encode() or b"&", URLENCODED
    else: body, kind = multipart(chosen, known[rng.integers(len(known))] if rng.random() < 0.5 else None), MULTIPART
    what = rng.random()
    if what < 0.6: body = mutated(rng, body)
    if what > 0.5: kind = printable(rng, kind) if rng.random() < 0.6 else STRANGE_KINDS[rng.integers(len(STRANGE_KINDS))]
    return body, kind

def test_no_mutated_picture_or_form_breaks_it(target: ApiProcess, admin: dict[str, str]) -> None:
    rng, known, token = np.random.default_rng(SEED), list(pictures().values()), admin["Authorization"]
    found: dict[str, Counter[int]] = {"pictures": Counter(), "forms": Counter()}
    for n in range(MUTATED):
        what, make = ("forms", a_form) if n % 2 else ("pictures", a_picture)
        body, kind = make(rng, known)
        route = "/predict" if n % 3 else "/predict_code"
        answer = target.client.post(route, content=body, headers=[(b"Authorization", token.encode()), (b"Content-Type", kind.encode("latin-1"))])
        found[what][answer.status_code] += 1
        told = f"{what} {n}, {kind!r}, {len(body)} bytes {body[:300]!r}: {answer.status_code} {answer.text[:500]}"
        assert answer.status_code in (200, 400, 413, 415, 422), told
        if answer.status_code == 200: assert len(answer.json()["predictions"]) == 5, told
        else:
            assert answer.headers["content-type"] == "application/problem+json", told
            document = answer.json()
            assert set(document) == {"type", "title", "status", "detail", "request_id"} and document["status"] == answer.status_code, told
            assert document["detail"] and "\n" not in document["detail"] and "Traceback" not in answer.text, told
    print({what: dict(sorted(c.items())) for what, c in found.items()})
    assert sum(c.total() for c in found.values()) == MUTATED
    for what, statuses in {"pictures": (200, 422), "forms": (200, 400, 415, 422)}.items():
        assert all(found[what][status] >= 20 for status in statuses), f"{what}: the mutations are neither harmless nor hopeless: {found[what]}"
    well(target, admin)
