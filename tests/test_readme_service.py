"The commands of the README that call the service work as printed."
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

def block_with(text: str) -> str:
    "The one block of commands that contains a text."
    (block,) = [b for b in BLOCKS if text in b]
    return str(block)

def run_lines(lines: str, api: ApiProcess, home: Path, catalog: Path) -> subprocess.CompletedProcess[str]:
    "Run commands in a folder with the files of `make demo`."
    (home / "data").mkdir(parents=True)
    (home / ".venv").symlink_to(ROOT / ".venv")
    (home / "data/raw").symlink_to(catalog)
    script = f"set -euo pipefail\n{lines.replace(HERE, api.url)}"
    run = subprocess.run(["bash", "-c", script], cwd=home, env=api.env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run

def json_objects(text: str) -> list[dict[str, Any]]:
    "The JSON objects in the output of commands."
    objects: list[dict[str, Any]] = []
    while "{" in text:
        text = text[text.index("{") :]
        document, end = json.JSONDecoder().raw_decode(text)
        objects.append(document)
        text = text[end:]
    return objects

@pytest.mark.services
@needs("curl")
def test_the_curl_commands_predict_a_product(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    lines = block_with(f"curl -s {HERE}/predict")
    assert [f"{HERE}/{route}" in lines for route in ("token", "predict ", "predict_code")] == [True] * 3
    own_api.start()
    run = run_lines(lines, own_api, tmp_path / "project", sample_catalog)
    both = json_objects(run.stdout)
    assert [set(d["experts"]) for d in both] == [{"text_linear", "image"}, {"text_linear"}]
    assert both[0]["predictions"][0]["label"] == 2583, "a pool"
    assert KEY not in run.stdout + run.stderr

@pytest.mark.services
@needs("curl")
def test_the_job_commands_classify_a_file(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    send, ask, fetch = block_with("/jobs/$JOB").split("\n\n")
    own_api.env["RAKUTEN_EMBEDDED_WORKER"] = "true" # as `make serve` has it
    own_api.start()
    wait = f"until ({ask}\n) | grep -q succeeded; do sleep 0.2; done"
    lines = "\n".join((block_with(f"curl -s {HERE}/predict"), send, ask, wait, fetch))
    run_lines(lines, own_api, home := tmp_path / "project", sample_catalog)
    files = (home / "predictions.csv", sample_catalog / "X_test_update.csv")
    predictions, products = (list(csv.reader(f.open(encoding="utf-8"))) for f in files)
    assert predictions[0][:3] == ["productid", "imageid", "prdtypecode"]
    assert [row[0] for row in predictions[1:]] == [row[3] for row in products[1:]]

@pytest.mark.services
@needs("curl")
def test_the_review_commands_label_a_product(own_api: ApiProcess, sample_catalog: Path, tmp_path: Path) -> None:
    own_api.start()
    pause = "sleep 1.5" # predictions are written within a second; a person types more slowly
    lines = "\n".join((block_with(f"curl -s {HERE}/predict"), pause, block_with("/review?limit=3")))
    documents = json_objects(run_lines(lines, own_api, home := tmp_path / "project", sample_catalog).stdout)
    (page,), (feedback,) = ([d for d in documents if key in d] for key in ("waiting", "reviewed"))
    assert {item["title"] for item in page["items"]} == {"Lot de cartes Pokémon", "Piscine hors sol ronde"}
    assert page["waiting"] == 2
    assert feedback["user"] == "rose" and feedback["prdtypecode"] == 1160 and feedback["reviewed"]
    assert feedback["request_id"] == "lot-1"
    labels = (folder / "Y_train_CVw08PX.csv" for folder in (home / "reviewed", sample_catalog))
    exported, before = (len(path.read_text(encoding="utf-8").splitlines()) for path in labels)
    assert exported == before + 1
