"""Hooks of schemathesis: known ids in generated feedback, an experiment that can be stopped, and a pause before
requests that must stay below a limit."""
import os
import time
from collections import Counter
from typing import Any

import httpx
import schemathesis

KNOWN = {"request_id": "4f0c9a", "product_id": "3804725264"} # the examples of the OpenAPI document
EXAMPLE_JOB = "0123456789abcdef0123456789abcdef" # likewise
EXAMPLE_MODEL = "0123456789ab" # likewise
PAUSES = 3 # for each operation on a job, and before an experiment is stopped
paused: Counter[str] = Counter()

@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    "Replace most valid ids by the known ones; leave the limit of requests about jobs before some for the known job."
    path = case.operation.path
    if path == "/feedback" and isinstance(case.body, dict): replace_ids(case.body)
    if (path, case.method.upper()) == ("/experiment", "DELETE") and paused[path] < PAUSES:
        paused[path] += 1
        start_experiment()
    known_job = path.startswith("/jobs/") and (case.path_parameters or {}).get("id") == EXAMPLE_JOB
    if known_job and case.method.upper() == "GET" and paused[path] < PAUSES:
        paused[path] += 1
        time.sleep(1.1) # the limit counts the requests of a second

def start_experiment() -> None:
    "Start an experiment, unless one is running."
    url, headers = os.environ["CONTRACT_URL"], {"Authorization": os.environ["CONTRACT_AUTHORIZATION"]}
    body = {"challenger": EXAMPLE_MODEL, "reason": "to be stopped"}
    assert httpx.post(f"{url}/experiment", json=body, headers=headers, timeout=10).status_code in (201, 409)

def replace_ids(body: dict[str, Any]) -> None:
    "An unknown prediction is looked up for a second, so most feedback is about the known one."
    for name, known in KNOWN.items():
        value = body.get(name)
        valid = isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()
        if valid and len(value) % 16: body[name] = known
