"Hooks of schemathesis: generated feedback names a known prediction, because an unknown one is looked up for a second."
from typing import Any

import schemathesis

KNOWN = {"request_id": "4f0c9a", "product_id": "3804725264"} # the examples of the OpenAPI document

@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    "Replace most valid ids by the known ones."
    if case.operation.path != "/feedback" or not isinstance(case.body, dict): return
    for name, known in KNOWN.items():
        value = case.body.get(name)
        valid = isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable()
        if valid and len(value) % 16: case.body[name] = known
