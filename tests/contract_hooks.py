"What schemathesis imports: generated words about predictions are about one that is there, or each would be waited for before it is called unknown."
from typing import Any

import schemathesis

KNOWN = {"request_id": "4f0c9a", "product_id": "3804725264"} # the examples of the document

@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    "Most valid ids become the known one's."
    if case.operation.path != "/feedback" or not isinstance(case.body, dict): return
    for name, known in KNOWN.items():
        value = case.body.get(name)
        if isinstance(value, str) and 0 < len(value) <= 64 and value.isprintable() and len(value) % 16: case.body[name] = known
