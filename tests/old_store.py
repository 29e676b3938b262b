"""Write a store as an earlier release wrote it, in raw SQL: `python tests/old_store.py URL DATA_DIR [VERSION]`.

The statements are those that commit f55966b emitted (version 3) and commit 34feb97 (version 4, where `kept` has
another name); versions 1 and 2 lack the later tables of version 3.
"""
import hashlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

PASSWORD = "a long enough one"
PASSWORD_HASH = "$2b$04$47ouIIm9C12Hc0r9no8nUu1xwDiA6mrBcKNpP1Ar0xoFJvucv.5zO"
PICTURE = b"the picture of a swimming pool"
DIGEST = hashlib.sha256(PICTURE).hexdigest()
JOB, RUNNING = "a" * 32, "b" * 32

TYPES = { # placeholder → type, by database
    "sqlite": {"serial": "INTEGER", "number": "INTEGER", "time": "DATETIME"},
    "postgresql": {"serial": "BIGSERIAL", "number": "BIGINT", "time": "TIMESTAMP WITHOUT TIME ZONE"}}

PREDICTIONS = '''CREATE TABLE predictions (id {serial} NOT NULL, request_id VARCHAR(64) NOT NULL, at {time} NOT NULL,
"user" VARCHAR(64) NOT NULL, product_id TEXT NOT NULL, prdtypecode INTEGER NOT NULL, confidence FLOAT NOT NULL,
needs_review BOOLEAN NOT NULL, top5 JSON NOT NULL, experts JSON NOT NULL, model_version VARCHAR(12) NOT NULL,
variant VARCHAR(32) NOT NULL, profile JSON NOT NULL, PRIMARY KEY (id))'''
USERS = '''CREATE TABLE users (name VARCHAR(64) NOT NULL, password_hash VARCHAR(60) NOT NULL, role VARCHAR(16) NOT NULL,
disabled BOOLEAN NOT NULL, generation INTEGER NOT NULL, created {time} NOT NULL, PRIMARY KEY (name))'''
JOBS = '''CREATE TABLE jobs (id VARCHAR(32) NOT NULL, "user" VARCHAR(64) NOT NULL, status VARCHAR(16) NOT NULL,
rows INTEGER NOT NULL, done INTEGER NOT NULL, errors INTEGER NOT NULL, turn INTEGER NOT NULL, created {time} NOT NULL,
finished {time}, message TEXT NOT NULL, PRIMARY KEY (id))'''
CHUNKS = '''CREATE TABLE job_chunks (job VARCHAR(32) NOT NULL, number INTEGER NOT NULL, first INTEGER NOT NULL,
rows INTEGER NOT NULL, done BOOLEAN NOT NULL, tries INTEGER NOT NULL, worker VARCHAR(160) NOT NULL, lease {time},
error TEXT NOT NULL, PRIMARY KEY (job, number))'''
KEPT = '''CREATE TABLE kept (prediction {number} NOT NULL, at {time} NOT NULL, wanted BOOLEAN NOT NULL,
content VARCHAR(64) NOT NULL, imageid TEXT NOT NULL, title TEXT NOT NULL, description TEXT NOT NULL,
picture VARCHAR(64) NOT NULL, PRIMARY KEY (prediction))'''
FEEDBACK = '''CREATE TABLE feedback (id {serial} NOT NULL, prediction {number} NOT NULL, "user" VARCHAR(64) NOT NULL,
reviewer BOOLEAN NOT NULL, at {time} NOT NULL, prdtypecode INTEGER NOT NULL, content VARCHAR(64) NOT NULL,
PRIMARY KEY (id), UNIQUE (prediction, "user"))'''

STATEMENTS: dict[int, list[str]] = { # version → what it added
    1: ["CREATE TABLE store_version (version INTEGER NOT NULL)", USERS, PREDICTIONS,
        "CREATE INDEX ix_predictions_at ON predictions (at)",
        "CREATE INDEX ix_predictions_request_id ON predictions (request_id)",
        'CREATE TABLE model_requests (id {serial} NOT NULL, at {time} NOT NULL, "user" VARCHAR(64) NOT NULL, '
        "PRIMARY KEY (id))",
        "CREATE TABLE model_reports (id {serial} NOT NULL, request {number} NOT NULL, process VARCHAR(128) NOT NULL, "
        "at {time} NOT NULL, model_version VARCHAR(12) NOT NULL, error TEXT NOT NULL, PRIMARY KEY (id))",
        "CREATE INDEX ix_model_reports_request ON model_reports (request)"],
    2: [JOBS, CHUNKS, "CREATE INDEX ix_jobs_finished ON jobs (finished)",
        "CREATE INDEX ix_jobs_status ON jobs (status)", 'CREATE INDEX ix_jobs_user ON jobs ("user")',
        'CREATE TABLE job_results (job VARCHAR(32) NOT NULL, "row" INTEGER NOT NULL, cells JSON NOT NULL, '
        'PRIMARY KEY (job, "row"))',
        "CREATE TABLE job_totals (state VARCHAR(16) NOT NULL, rows BIGINT NOT NULL, PRIMARY KEY (state))"],
    3: [KEPT, FEEDBACK, "CREATE INDEX ix_predictions_product_id ON predictions (product_id)",
        *(f"CREATE INDEX ix_kept_{column} ON kept ({column})" for column in ("at", "content", "picture")),
        *(f"CREATE INDEX ix_feedback_{column} ON feedback ({column})" for column in ("content", "prediction"))],
    4: ["DROP TABLE kept", KEPT.replace("TABLE kept", "TABLE retained_products").replace("wanted", "for_review"),
        *(f"CREATE INDEX ix_retained_products_{column} ON retained_products ({column})"
          for column in ("at", "content", "picture"))]}

def content(title: str, picture: str = "") -> str:
    "The hash of a product's content."
    return hashlib.sha256(json.dumps([title, "", picture]).encode()).hexdigest()

def prediction(request_id: str, code: int, confidence: float, needs_review: bool) -> dict[str, Any]:
    "A row of `predictions`, without its number."
    return {"request_id": request_id, "at": at(10), "user": "paul", "product_id": f"p-{request_id}",
            "prdtypecode": code, "confidence": confidence, "needs_review": needs_review,
            "top5": [[code, confidence], [10, 0.01]], "experts": {"text_linear": 0.75, "image": 0.25},
            "model_version": "0123456789ab", "variant": "champion",
            "profile": [1.0, 2.5, 0.0, 1e-300, 12345678.9, 0.0, 1.0, 3.0]}

def kept(number: int, wanted: bool, title: str, picture: str = "") -> dict[str, Any]:
    "A row of `kept`."
    return {"prediction": number, "at": at(10, number), "wanted": wanted, "content": content(title, picture),
            "imageid": "", "title": title, "description": "", "picture": picture}

def renamed(row: dict[str, Any]) -> dict[str, Any]:
    "A row of `kept` as version 4 has it in `retained_products`."
    return {"for_review" if name == "wanted" else name: value for name, value in row.items()}

def user(name: str, role: str) -> dict[str, Any]:
    "A row of `users`."
    return {"name": name, "password_hash": PASSWORD_HASH, "role": role, "disabled": name == "rose", "generation": 3,
            "created": at(8)}

def chunk(number: int) -> dict[str, Any]:
    "A row of `job_chunks`: the first is done, the last writes the files."
    return {"job": RUNNING, "number": number, "first": number, "rows": int(number < 2), "done": number == 0,
            "tries": int(number == 0), "worker": "", "lease": None, "error": ""}

def label(number: int, user: str, code: int, content: str) -> dict[str, Any]:
    "A row of `feedback`, without its number; Marie is a reviewer."
    return {"prediction": number, "user": user, "reviewer": user == "marie", "at": at(12, number), "prdtypecode": code,
            "content": content}

def at(hour: int, second: int = 0) -> datetime:
    "A time of one day, in UTC."
    return datetime(2026, 11, 24, hour, 30, second, 123456, tzinfo=UTC)

POOL, NOVEL, GAME = "Piscine à débordement 🏊", "Roman d'aventure", "Échiquier pliant"
ROWS: dict[int, dict[str, list[dict[str, Any]]]] = { # version → table → rows
    1: {"users": [user("marie", "reviewer"), user("paul", "user"), user("rose", "admin")],
        "predictions": [prediction("r1", 2583, 0.31, True), prediction("r2", 2403, 0.97, False),
                        prediction("r3", 1281, 0.22, True), prediction("r4", 10, 0.99, False)],
        "model_requests": [{"at": at(9), "user": "rose"}],
        "model_reports": [
            {"request": 1, "process": "host:1", "at": at(9, 5), "model_version": "0123456789ab", "error": ""}]},
    2: {"jobs": [{"id": JOB, "user": "paul", "status": "succeeded", "rows": 1, "done": 1, "errors": 0, "turn": 2,
                  "created": at(9), "finished": at(9, 30), "message": ""},
                 {"id": RUNNING, "user": "marie", "status": "running", "rows": 2, "done": 1, "errors": 1, "turn": 1,
                  "created": at(11), "finished": None, "message": ""}],
        "job_chunks": [chunk(0), chunk(1), chunk(2)],
        "job_results": [{"job": RUNNING, "row": 0, "cells": ["4711", "", "", "", "", "true", "", "", "neither"]}],
        "job_totals": [{"state": "answered", "rows": 1}, {"state": "error", "rows": 1}]},
    3: {"kept": [kept(1, True, POOL, DIGEST), kept(2, False, NOVEL), kept(3, True, GAME)],
        "feedback": [label(1, "paul", 2583, content(POOL, DIGEST)), label(3, "marie", 1302, content(GAME))]}}

def stored(value: Any) -> Any:
    "A value as the earlier release gave it to the driver."
    if isinstance(value, datetime): return f"{value:%Y-%m-%d %H:%M:%S.%f}"
    return json.dumps(value) if isinstance(value, list | dict) else value

def insert(connection: sa.Connection, table: str, row: dict[str, Any]) -> None:
    "Insert one row."
    names, marks = ", ".join(f'"{name}"' for name in row), ", ".join(f":{name}" for name in row)
    statement = sa.text(f"INSERT INTO {table} ({names}) VALUES ({marks})")
    connection.execute(statement, {name: stored(value) for name, value in row.items()})

def write_files(data_dir: Path) -> None:
    "Write the picture, the predictions of the finished job and the next chunk of the running one."
    files = {f"kept/{DIGEST[:2]}/{DIGEST}": PICTURE, f"jobs/{JOB}/predictions.csv": b"productid\n4711\n",
             f"jobs/{RUNNING}/chunk-000001.json": b'[["4712", "", "Jeu", "en bois"]]'}
    for name, raw in files.items():
        (data_dir / name).parent.mkdir(parents=True)
        (data_dir / name).write_bytes(raw)

def write_old_store(url: str, data_dir: Path, version: int = 3) -> dict[str, list[dict[str, Any]]]: # table → rows
    "Write a store of this version and its files; returns all rows."
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite": Path(str(engine.url.database)).parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    with engine.begin() as c:
        for step in range(1, version + 1):
            for statement in STATEMENTS[step]: c.execute(sa.text(statement.format(**TYPES[engine.dialect.name])))
            rows |= ROWS.get(step, {})
        if version >= 4: rows["retained_products"] = [renamed(row) for row in rows.pop("kept")]
        for table, some in rows.items():
            for row in some: insert(c, table, row)
        insert(c, "store_version", {"version": version})
    engine.dispose()
    if version >= 3: write_files(data_dir)
    return rows

if __name__ == "__main__": write_old_store(sys.argv[1], Path(sys.argv[2]), int((sys.argv[3:] or ["3"])[0]))
