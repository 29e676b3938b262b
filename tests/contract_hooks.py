"Hooks of schemathesis: known ids in generated feedback, and a pause before requests that must stay below a limit."
import time
from collections import Counter
from typing import Any

import schemathesis

KNOWN = {"request_id": "4f0c9a", "product_id": "3804725264"} # the examples of the OpenAPI document
EXAMPLE_JOB = "0123456789abcdef0123456789abcdef" # likewise
PAUSES = 3 # for each operation on a job
paused: Counter[str] = Counter()

@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    "Replace most valid ids by the known ones; leave the limit of requests about jobs before some for the known job."
    path = case.operation.path
    if path == "/feedback" and isinstance(case.body, dict): replace_ids(case.body)
    known_job = path.startswith("/jobs/") and (case.path_parameters or {}).get("id") == EXAMPLE_JOB
    if known_job and case.method.upper() == "GET" and paused[path] < PAUSES:
        paused[path] += 1
        time.sleep(1.1) # the limit counts the requests of a second

def replace_ids(body: dict[str, Any]) -> None:
    "An unknown prediction is looked up for a second, so most feedback is about the known one."
    for name, known in KNOWN.items():
        value = body.get(name)
        valid = isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()
        if valid and len(value) % 16: body[name] = known
