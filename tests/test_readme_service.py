"The lines of the README that talk to the service work as they are printed."
import csv
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

def lines_with(words: str) -> str:
    "The block with these words in it."
    (block,) = [b for b in BLOCKS if words in b]
    return str(block)

def type_in(lines: str, api: ApiProcess, home: Path, catalog: Path) -> subprocess.CompletedProcess[str]:
    "Type lines where `make demo` has left what they need."
    (home / "data").mkdir(parents=True)
    (home / ".venv").symlink_to(ROOT / ".venv")
    (home / "data/raw").symlink_to(catalog)
    script = f"set -euo pipefail\n{lines.replace(HERE, api.url)}"
    answer = subprocess.run(["bash", "-c", script], cwd=home, env=api.env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer

def documents(said: str) -> list[dict[str, Any]]:
    "The JSON objects among what was printed."
    found: list[dict[str, Any]] = []
    while "{" in said:
        said = said[said.index("{") :]
        document, end = json.JSONDecoder().raw_decode(said)
        found.append(document)
        said = said[end:]
    return found

@pytest.mark.services
@needs("curl")
def test_the_curl_lines_work_as_printed(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    lines = lines_with(f"curl -s {HERE}/predict")
    assert [f"{HERE}/{route}" in lines for route in ("token", "predict ", "predict_code")] == [True] * 3
    own_api.start()
    answer = type_in(lines, own_api, tmp_path / "project", sample_catalog)
    both = documents(answer.stdout)
    assert [set(d["experts"]) for d in both] == [{"text_linear", "image"}, {"text_linear"}]
    assert both[0]["predictions"][0]["label"] == 2583, "a pool"
    assert KEY not in answer.stdout + answer.stderr

@pytest.mark.services
@needs("curl")
def test_a_file_of_products_is_sent_as_printed(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    sent, asked, fetched = lines_with("/jobs/$JOB").split("\n\n")
    own_api.env["RAKUTEN_EMBEDDED_WORKER"] = "true" # as `make serve` has it
    own_api.start()
    wait = f"until ({asked}\n) | grep -q succeeded; do sleep 0.2; done"
    type_in("\n".join((lines_with(f"curl -s {HERE}/predict"), sent, asked, wait, fetched)), own_api, home := tmp_path / "project", sample_catalog)
    said, asked_for = (list(csv.reader(f.open(encoding="utf-8"))) for f in (home / "predictions.csv", sample_catalog / "X_test_update.csv"))
    assert said[0][:3] == ["productid", "imageid", "prdtypecode"] and [row[0] for row in said[1:]] == [row[3] for row in asked_for[1:]]

@pytest.mark.services
@needs("curl")
def test_a_doubtful_product_is_reviewed_as_printed(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    own_api.start()
    once_more = "sleep 1.5" # the log of predictions may be a second behind, whoever types is slower than that
    lines = "\n".join((lines_with(f"curl -s {HERE}/predict"), once_more, lines_with("/review?limit=3")))
    said = documents(type_in(lines, own_api, home := tmp_path / "project", sample_catalog).stdout)
    (page,), (word,) = ([d for d in said if key in d] for key in ("waiting", "reviewed"))
    assert {i["title"] for i in page["items"]} == {"Lot de cartes Pokémon", "Piscine hors sol ronde"} and page["waiting"] == 2
    assert word["user"] == "rose" and word["prdtypecode"] == 1160 and word["reviewed"] and word["request_id"] == "lot-1"
    exported, before = (len((folder / "Y_train_CVw08PX.csv").read_text(encoding="utf-8").splitlines()) for folder in (home / "reviewed", sample_catalog))
    assert exported == before + 1
