"""The account of how good a model is, repeated by papermill with parameters of one's own."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.services # of a kernel, and by the minute it takes

def test_the_account_is_repeated_with_other_experts_on_another_catalogue(sample_catalog: Path, env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "account.ipynb"
    given = {"catalog": str(sample_catalog), "experts": "text_linear,image", "references": "", "pools": "text_linear", "folds": "2", "precision": "0.6",
             "held_out": str(sample_catalog)}
    words = [w for name, value in given.items() for w in ("-p", name, value)]
    ran = subprocess.run([sys.executable, "-m", "papermill", ROOT / "nbs/guides/40_accuracy.ipynb", out, *words, "--no-progress-bar"],
                         cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    tables = ["".join(output["data"]["text/markdown"]) for cell in json.loads(out.read_text(encoding="utf-8"))["cells"]
              for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {})]
    experts, pools, *_, plain = tables
    assert re.findall(r"^\| (\w[^|]*?) \|", experts, re.M)[1:] == ["text_linear", "image", "text_linear, pooled", "text_linear + image: the model"]
    assert "log-linear pool" in pools and "stacked" in pools
    assert "TfidfVectorizer + LinearSVC" in plain and "the model" in plain
    assert any(t.startswith("Promised: 60%") for t in tables)
