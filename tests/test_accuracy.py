"The accuracy guide runs under papermill with other parameters."
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.services # starts a kernel, takes a minute
MEASURED = 4 # tables of figures.json at the end of the guide

def test_the_guide_runs_with_other_experts_on_another_catalogue(
    sample_catalog: Path, env: dict[str, str], tmp_path: Path,
) -> None:
    out = tmp_path / "account.ipynb"
    values = {"catalog": str(sample_catalog), "experts": "text_linear,image", "references": "", "pools": "text_linear",
              "folds": "2", "precision": "0.6", "held_out": str(sample_catalog)}
    options = [word for name, value in values.items() for word in ("-p", name, value)]
    command = [sys.executable, "-m", "papermill", ROOT / "nbs/guides/40_accuracy.ipynb", out, *options]
    ran = subprocess.run([*command, "--no-progress-bar"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    cells = json.loads(out.read_text(encoding="utf-8"))["cells"]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    tables = ["".join(d["text/markdown"]) for d in data if "text/markdown" in d]
    experts, pools, *_, baseline = tables[:-MEASURED]
    names = re.findall(r"^\| (\w[^|]*?) \|", experts, re.M)[1:]
    assert names == ["text_linear", "image", "text_linear, fused", "text_linear + image: the model"]
    assert "log-linear pool" in pools and "stacked" in pools
    assert "TfidfVectorizer + LinearSVC" in baseline and "the model" in baseline
    assert any(t.startswith("Target: 60%") for t in tables)
