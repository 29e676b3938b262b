"Notebooks have the structure of a chapter and clean outputs, the package equals their export, and pages can be built."
import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

NBS = ROOT / "nbs"

def hidden(path: Path) -> bool:
    "Whether a notebook is in a generated or hidden folder."
    return any(part.startswith(("_", ".")) for part in path.relative_to(NBS).parts)

NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not hidden(p))
LONGEST_CELL = 45 # lines of an exported cell
LARGEST = 1_000_000 # bytes of a notebook with its outputs
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|tmp|root|home|Users)/[\w.]")
CHECKS = re.compile(r"\b(assert\b|test_\w+\(|pytest\.raises)")

def cells(path: Path) -> list[dict[str, Any]]:
    "The cells of a notebook, each source as one string."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [c | {"source": "".join(c["source"])} for c in notebook["cells"]]

def directives(cell: dict[str, Any]) -> set[str]:
    "The words after `#|` that open a code cell."
    if cell["cell_type"] != "code": return set()
    return set(re.findall(r"^#\|\s*([\w-]+)", cell["source"], re.M))

def code(cell: dict[str, Any]) -> str:
    "A code cell without its directives and magics."
    return "\n".join(line for line in cell["source"].splitlines() if not line.startswith(("#|", "%")))

def imports(node: ast.stmt) -> bool:
    "Whether a statement is an import, including one under TYPE_CHECKING."
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name): return node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.Import | ast.ImportFrom)

def only_imports(cell: dict[str, Any]) -> bool:
    "Whether the cell contains imports only."
    return cell["cell_type"] == "code" and all(imports(n) for n in ast.parse(code(cell)).body)

def exports(path: Path) -> bool:
    "Whether the notebook exports a module."
    return any("default_exp" in directives(c) for c in cells(path))

def texts(cell: dict[str, Any]) -> list[str]:
    "The text outputs of a cell; SVG counts as text."
    outputs = []
    for output in cell.get("outputs", []):
        outputs.append("".join(output.get("text", "")))
        data = output.get("data", {}).items()
        outputs += ["".join(v) for kind, v in data if kind.startswith("text/") or kind == "image/svg+xml"]
    return outputs

def name(path: Path) -> str:
    "The path of a notebook below nbs/."
    return path.relative_to(NBS).as_posix()

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
each_exporting = pytest.mark.parametrize("path", [p for p in NOTEBOOKS if exports(p)], ids=name)
each_stage = pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "stages"], ids=name)

@each
def test_opens_with_a_title_and_a_subtitle(path: Path) -> None:
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# \S.*\n\n?> \S.*", first["source"].strip()), "one `# Title`, one `> sentence`, nothing else"

@each_exporting
def test_opens_with_module_imports_and_a_paragraph(path: Path) -> None:
    opening = iter(cells(path)[1:])
    assert directives(next(opening)) == {"default_exp"}
    cell = next(opening)
    for directive in ("export", "hide"):  # either may be absent
        if directive in directives(cell):
            assert only_imports(cell), f"the first `#| {directive}` cell holds imports only"
            cell = next(opening)
    assert cell["cell_type"] == "markdown", "then a paragraph on the purpose of the page"

@each
def test_imports_are_in_separate_cells(path: Path) -> None:
    for cell in cells(path):
        if cell["cell_type"] != "code" or "%" in cell["source"][:1]: continue
        kinds = {imports(n) for n in ast.parse(code(cell)).body}
        assert len(kinds) < 2, f"a cell with imports and calls runs when the site is built:\n{cell['source'][:300]}"

@each_exporting
def test_reads_as_a_chapter(path: Path) -> None:
    own = cells(path)
    exported = [c for c in own if directives(c) & {"export", "exports"} and not only_imports(c)]
    filled = lambda cell: sum(bool(line.strip()) for line in code(cell).splitlines())
    long = [c["source"].splitlines()[1] for c in exported if filled(c) > LONGEST_CELL]
    checks = [c for c in own if c["cell_type"] == "code" and CHECKS.search(c["source"])]
    prose = [c for c in own if c["cell_type"] == "markdown"]
    assert long == [], f"exported cells over {LONGEST_CELL} lines"
    assert 3 * len(checks) >= len(exported), f"{len(exported)} exported cells, {len(checks)} that check something"
    assert 3 * len(prose) >= len(own) - len(prose), f"{len(own) - len(prose)} code cells, {len(prose)} of prose"

@each
def test_outputs_are_clean(path: Path) -> None:
    for cell in cells(path):
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"an output is an error: {output.get('evalue')}"
            assert output.get("name") != "stderr", f"an output is a warning: {''.join(output['text'])[:300]}"
        for text in [*texts(cell), cell["source"]]:
            place = MACHINE_PATH.search(text)
            assert not place, f"a path of one machine: …{text[max(0, place.start() - 40):place.end() + 40]}…"
            assert 'class="dataframe"' not in text, "show a table as Markdown"
    assert path.stat().st_size <= LARGEST, "outputs too large to keep in git"

@each_stage
def test_a_stage_has_one_parameters_cell(path: Path) -> None:
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1

@each_stage
def test_a_stage_declares_the_parameters_of_its_section(path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    section = params.get(path.stem.split("_", 1)[1]) or {}
    tagged = next(c for c in cells(path) if "parameters" in c["metadata"].get("tags", []))
    body = ast.parse(tagged["source"]).body
    declared = {t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    declared |= {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert set(section) - declared == set(), "in params.yaml and not in the notebook"

# --- notebooks and package agree

GENERATED = ("rakuten_nb", "nbs")

def tree(folder: Path) -> dict[str, bytes]:
    "All notebooks and modules of the generated folders, by path."
    files = (p for top in GENERATED for kind in ("*.py", "*.ipynb") for p in (folder / top).rglob(kind))
    own = (p for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in own}

def copy_sources(copy: Path) -> None:
    "Copy notebooks, package and settings."
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for top in GENERATED: shutil.copytree(ROOT / top, copy / top, symlinks=True, ignore=unwanted)
    for file in ("settings.ini", "setup.py", "_quarto.yml", "params.yaml"): shutil.copy(ROOT / file, copy)

def test_the_package_equals_the_export_of_the_notebooks(tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    copy_sources(copy)
    before = tree(copy)
    for module in (copy / "rakuten_nb").rglob("*.py"): module.unlink()
    env = os.environ | {"JUPYTER_DATA_DIR": str(tmp_path / "jupyter")}
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, env=env, check=True, capture_output=True)
    after = tree(copy)
    assert {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)} == set(), "run `make export`"

# What `nbdev_docs` does before Quarto: every page is processed, and signatures are evaluated.
PROCESS = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=2, force=True)"

@pytest.mark.services
def test_every_page_is_processed_for_the_site(tmp_path: Path) -> None:
    copy = tmp_path / "site"
    copy_sources(copy)
    own = {"PYTHONPATH": str(copy), "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", PROCESS]
    answer = subprocess.run(command, cwd=copy, env=os.environ | own, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    pages = {p.relative_to(copy / "_proc").as_posix() for p in (copy / "_proc").rglob("*.ipynb")}
    assert {name(p) for p in NOTEBOOKS} <= pages
    assert "Traceback" not in answer.stderr, answer.stderr[-3000:]

# --- the documentation site

def sidebar_entries(node: Any) -> list[str]:
    "The pages of a sidebar."
    if isinstance(node, str): return [node]
    if isinstance(node, list): return [e for n in node for e in sidebar_entries(n)]
    return [*([node["href"]] if "href" in node else []), *sidebar_entries(node.get("contents", []))]

def test_the_sidebar_lists_every_page_once() -> None:
    site = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))
    named = sidebar_entries(site["website"]["sidebar"])
    assert sorted(named) == sorted(name(p) for p in NOTEBOOKS)

def test_the_quarto_configuration_is_valid() -> None:
    assert (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml", "nbs/_quarto.yml is a link to the one at the root"
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert site["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    assert "commonmark" not in site["format"]
    panache = Path(sys.executable).with_name("panache")
    answer = subprocess.run([panache, "lint", ROOT / "_quarto.yml"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr

def test_folders_without_exports_are_excluded_from_notebook_tests() -> None:
    folders = {p.parent for p in NOTEBOOKS if p.parent.name in ("stages", "guides")}
    assert [f.name for f in folders if not (f / ".notest").exists()] == []

def test_tags_survive_cleaning() -> None:
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert "tags" in settings["DEFAULT"]["allowed_cell_metadata_keys"].split(), "papermill finds its cell by a tag"
