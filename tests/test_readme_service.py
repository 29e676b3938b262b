"The lines of the README that talk to the service work as they are printed."
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from api_process import KEY, ApiProcess
from conftest import ROOT, needs

BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
HERE = "http://127.0.0.1:8000"

def lines_for_a_client() -> str:
    "The block with curl in it."
    (block,) = [b for b in BLOCKS if f"curl -s {HERE}" in b]
    return str(block)

@pytest.mark.services
@needs("curl")
def test_the_curl_lines_work_as_printed(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    lines, home = lines_for_a_client(), tmp_path / "project"
    assert [f"{HERE}/{route}" in lines for route in ("token", "predict ", "predict_code")] == [True] * 3
    (home / "data").mkdir(parents=True) # what `make demo` leaves, as far as these lines need it
    (home / ".venv").symlink_to(ROOT / ".venv")
    (home / "data/raw").symlink_to(sample_catalog)
    own_api.start()
    script = f"set -euo pipefail\n{lines.replace(HERE, own_api.url)}"
    answer = subprocess.run(["bash", "-c", script], cwd=home, env=own_api.env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    said, documents = answer.stdout, []
    while "{" in said:
        said = said[said.index("{") :]
        document, end = json.JSONDecoder().raw_decode(said)
        documents.append(document)
        said = said[end:]
    both: list[dict[str, Any]] = documents
    assert [set(d["experts"]) for d in both] == [{"text_linear", "image"}, {"text_linear"}]
    assert both[0]["predictions"][0]["label"] == 2583, "a pool"
    assert KEY not in answer.stdout + answer.stderr
