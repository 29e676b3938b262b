"The floors hold: imports run downwards only, in no circle, and what serves loads nothing that trains."
import ast
import re
import subprocess
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "rakuten_nb"
# From the ground up. A floor is a folder of the package, or a module at its top.
FLOORS = [{"config", "console", "errors", "files", "metrics", "params", "taxonomy"}, {"data"}, {"models"}, {"evaluation"}, {"serving"}, {"operations"}, {"cli"}]
# Within models, from the ground up too; what is not named here is an expert or a part of one.
SHELVES = [{"experts"}, set(), {"fusion"}, {"bundle", "pools"}, {"training"}, {"workspace"}]
AN_EXPERT = 1
# What a serving process never loads.
HEAVY = {"IPython", "bentoml", "dvc", "ipykernel", "keras", "matplotlib", "mlflow", "nbclient", "nbformat", "onnx", "papermill", "tensorflow", "tf2onnx",
         "torch"}
LIGHT = [f"{PACKAGE}.cli", f"{PACKAGE}.models.bundle", f"{PACKAGE}.serving.api"]

def module_name(path: Path) -> str:
    "`rakuten_nb/data/catalog.py` → `data.catalog`."
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)

SOURCES = {module_name(p): p for p in sorted((ROOT / PACKAGE).rglob("*.py")) if p.name not in ("__init__.py", "_modidx.py")}

def within(found: set[str], known: set[str], name: str) -> set[str]:
    "Those of `found` that are other modules of the package, as it calls them."
    return {m.removeprefix(f"{PACKAGE}.") for m in found} & known - {name}

def named(name: str, source: str, known: set[str]) -> set[str]:
    "The modules that the source of `name` holds as strings: a registry's `rakuten_nb.models.image:ImageExpert`."
    strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return within({s.split(":")[0] for s in strings if re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", s)}, known, name)

def imported(name: str, source: str, known: set[str]) -> set[str]:
    "The modules of the package that the source of module `name` imports anywhere, in functions too."
    found: set[str] = set()
    home = [PACKAGE, *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*home[: len(home) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join(base)} | {".".join([*base, a.name]) for a in node.names}
    return within(found, known, name)

def each_module(seen: Callable[[str, str, set[str]], set[str]]) -> dict[str, set[str]]:
    "Each module with those that `seen` finds in its source."
    return {name: seen(name, path.read_text(encoding="utf-8"), set(SOURCES)) for name, path in SOURCES.items()}

def floor(name: str) -> int:
    "On which floor a module stands; -1 if on none."
    return next((i for i, rooms in enumerate(FLOORS) if name.split(".")[0] in rooms), -1)

def shelf(name: str) -> int:
    "How high a module of `models` stands among its own."
    return next((i for i, rooms in enumerate(SHELVES) if name.split(".")[1] in rooms), AN_EXPERT)

def climbs(name: str, other: str) -> bool:
    "Whether module `name` looks upwards when it imports `other`."
    if floor(name) != floor(other): return floor(name) < floor(other)
    return name.startswith("models.") and other.startswith("models.") and shelf(name) < shelf(other)

def test_the_reader_of_imports_sees_every_kind() -> None:
    known = {"config", "data.catalog", "data.clean", "models.bundle", "serving.api", "cli"}
    lines = ["from ..config import a", "from .clean import b", "from .. import cli", "def f():", "    import rakuten_nb.models.bundle"]
    source = "\n".join([*lines, "app = 'rakuten_nb.serving.api:app'"])
    assert imported("data.catalog", source, known) == {"config", "data.clean", "cli", "models.bundle"}
    assert named("data.catalog", source, known) == {"serving.api"}
    assert climbs("data.catalog", "models.bundle") and not climbs("models.bundle", "data.catalog")
    assert climbs("models.image", "models.fusion") and not climbs("models.training", "models.bundle")

def test_every_module_stands_on_a_floor() -> None:
    assert SOURCES, "the package is empty: run `make export`"
    assert [name for name in SOURCES if floor(name) < 0] == []

def test_imports_run_downwards() -> None:
    wrong = [f"{name} imports {other}" for name, others in each_module(imported).items() for other in sorted(others) if climbs(name, other)]
    assert wrong == []

def test_a_registry_names_nothing_of_a_higher_floor() -> None:
    # On its own floor it may: an expert joins by being named, and the contract's module holds the list.
    wrong = [f"{name} names {other}" for name, others in each_module(named).items() for other in sorted(others) if floor(name) < floor(other)]
    assert wrong == []

def test_imports_run_in_no_circle() -> None:
    try: TopologicalSorter(each_module(imported)).prepare()
    except CycleError as e: pytest.fail("a circle of imports: " + " → ".join(e.args[1]))

def served() -> list[str]:
    "The distributions of the light set, as requirements/serve.txt pins them."
    lines = (ROOT / "requirements" / "serve.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("==")[0] for line in lines if "==" in line]

# Imports a module in a process in which only the distributions named after it can be found.
ALONE = """
import importlib, re, sys
from importlib.metadata import packages_distributions
module, *allowed = sys.argv[1:]
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
absent = {p for p, found in packages_distributions().items() if not {plain(d) for d in found} & {*allowed, "rakuten-nb"}}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent: raise ModuleNotFoundError(f"No module named {name!r} in the light set", name=name)
sys.meta_path.insert(0, Absent())
importlib.import_module(module)
"""
LOADED = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{name.split('.')[0] for name in sys.modules})"

def python(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    "A process of its own, run from the root."
    return subprocess.run([sys.executable, "-c", source, *args], cwd=ROOT, capture_output=True, text=True, check=False)

light = pytest.mark.parametrize("module", [m for m in LIGHT if m.removeprefix(f"{PACKAGE}.") in SOURCES])

@light
def test_what_serves_loads_nothing_that_trains(module: str) -> None:
    answer = python(LOADED, module)
    assert answer.returncode == 0, answer.stderr
    assert HEAVY & set(answer.stdout.split()) == set()

@light
def test_what_serves_needs_the_light_set_only(module: str) -> None:
    answer = python(ALONE, module, *served())
    assert answer.returncode == 0, answer.stderr

def test_the_light_set_lacks_what_trains() -> None:
    assert "in the light set" in python(ALONE, "matplotlib", *served()).stderr

def test_the_package_writes_and_reads_no_pickle() -> None:
    guilty = re.compile(r"^\s*(import|from)\s+(pickle|cloudpickle|joblib|dill|shelve)\b|allow_pickle\s*=\s*True", re.M)
    # One module reads what another project pickled, a PyTorch file of weights, and admits listed names only.
    assert [name for name, path in SOURCES.items() if guilty.search(path.read_text(encoding="utf-8"))] in ([], ["models.backbone"])
