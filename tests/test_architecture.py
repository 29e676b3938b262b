"The layers of the package: imports run downwards, without cycles, and serving loads no training library."
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
# From the bottom up. A layer is a set of folders of the package, or of modules at its top.
BASE = {"addresses", "config", "console", "errors", "files", "metrics", "params", "taxonomy"}
LAYERS = [BASE, {"data"}, {"models"}, {"evaluation", "tracking", "store"}, {"serving", "operations"}, {"cli"}]
# Folders of one layer that do not import each other.
APART = [{"serving", "operations"}]
# Within a folder, from the bottom up; modules that are not named belong to the layer of None.
INNER: dict[str, list[set[str | None]]] = {
    "models": [{"experts", "onnx_runtime"}, {None}, {"fusion"}, {"bundle"}, {"training"}, {"workspace"}],
    "serving": [{"problems", "tokens"}, {None}, {"service"}, {"dependencies"}, {"routes"}, {"api"}, {"bento"}],
}
# Libraries that a serving process never loads.
HEAVY = {"IPython", "alembic", "bentoml", "dvc", "huggingface_hub", "ipykernel", "keras", "matplotlib", "mlflow",
         "nbclient", "nbformat", "onnx", "papermill", "tensorflow", "tf2onnx", "torch"}
LIGHT = [f"{PACKAGE}.cli", f"{PACKAGE}.models.bundle", f"{PACKAGE}.serving.api"]

def module_name(path: Path) -> str:
    "`rakuten_nb/data/catalog.py` → `data.catalog`."
    return ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)

SKIPPED = ("__init__.py", "__main__.py", "_modidx.py")
SOURCES = {module_name(p): p for p in sorted((ROOT / PACKAGE).rglob("*.py")) if p.name not in SKIPPED}

def within(names: set[str], known: set[str], name: str) -> set[str]:
    "Those of `names` that are other modules of the package, without its prefix."
    return {m.removeprefix(f"{PACKAGE}.") for m in names} & known - {name}

def named(name: str, source: str, known: set[str]) -> set[str]:
    "Modules that the source of `name` contains as strings, as in a registry: `rakuten_nb.models.image:ImageExpert`."
    strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return within({s.split(":")[0] for s in strings if re.fullmatch(rf"{PACKAGE}(\.\w+)+(:\w+)?", s)}, known, name)

def imported(name: str, source: str, known: set[str]) -> set[str]:
    "Modules of the package that the source of module `name` imports, in functions too."
    modules: set[str] = set()
    home = [PACKAGE, *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): modules |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*home[: len(home) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            modules |= {".".join(base)} | {".".join([*base, a.name]) for a in node.names}
    return within(modules, known, name)

def each_module(find: Callable[[str, str, set[str]], set[str]]) -> dict[str, set[str]]:
    "Each module with the modules that `find` returns for its source."
    return {name: find(name, path.read_text(encoding="utf-8"), set(SOURCES)) for name, path in SOURCES.items()}

def folder(name: str) -> str:
    "The folder of a module, or the module itself at the top of the package."
    return name.split(".")[0]

def layer(name: str) -> int:
    "The layer of a module; -1 without one."
    return next((i for i, rooms in enumerate(LAYERS) if folder(name) in rooms), -1)

def inner_layer(name: str) -> int:
    "The layer of a module within its folder; 0 where the folder has no inner layers."
    layers = INNER.get(folder(name), [{None}])
    part = name.split(".")[1] if "." in name else None
    default = next(i for i, rooms in enumerate(layers) if None in rooms)
    return next((i for i, rooms in enumerate(layers) if part in rooms), default)

def climbs(name: str, other: str) -> bool:
    "Whether an import of `other` by module `name` breaks the order of the layers."
    if any({folder(name), folder(other)} == pair for pair in APART): return True
    if layer(name) != layer(other): return layer(name) < layer(other)
    return folder(name) == folder(other) and inner_layer(name) < inner_layer(other)

def test_the_import_reader_finds_every_kind_of_import() -> None:
    known = {"config", "data.catalog", "data.clean", "models.bundle", "serving.api", "cli"}
    lines = ["from ..config import a", "from .clean import b", "from .. import cli", "def f():",
             "    import rakuten_nb.models.bundle"]
    source = "\n".join([*lines, "app = 'rakuten_nb.serving.api:app'"])
    assert imported("data.catalog", source, known) == {"config", "data.clean", "cli", "models.bundle"}
    assert named("data.catalog", source, known) == {"serving.api"}

@pytest.mark.parametrize(("name", "other", "wrong"), [
    ("data.catalog", "models.bundle", True), ("models.bundle", "data.catalog", False),
    ("models.image", "models.fusion", True), ("models.training", "models.bundle", False),
    ("serving.service", "operations.bench", True), ("operations.bench", "serving.api", True),
    ("store.jobs", "serving.worker", True), ("serving.worker", "store.jobs", False),
    ("serving.batching", "serving.service", True), ("serving.routes.jobs", "serving.api", True),
    ("serving.service", "serving.problems", False), ("cli.models", "operations.bench", False)])
def test_an_import_against_the_order_is_found(name: str, other: str, wrong: bool) -> None:
    assert climbs(name, other) is wrong

def test_every_module_belongs_to_a_layer() -> None:
    assert SOURCES, "the package is empty: run `make export`"
    assert [name for name in SOURCES if layer(name) < 0] == []

def test_imports_run_downwards() -> None:
    pairs = ((name, other) for name, others in each_module(imported).items() for other in sorted(others))
    assert [f"{name} imports {other}" for name, other in pairs if climbs(name, other)] == []

def test_the_service_does_not_know_http() -> None:
    web = re.compile(r"^\s*(from|import) (starlette|fastapi|python_multipart)\b|\bProblem\b", re.M)
    core = ("batching", "model_manager", "model_source", "rate_limits", "service", "tokens", "worker")
    sources = {name: SOURCES[f"serving.{name}"].read_text(encoding="utf-8") for name in core}
    assert [name for name, source in sources.items() if web.search(source)] == []

def test_a_registry_names_no_module_of_a_higher_layer() -> None:
    # Within a layer it may: an expert joins by its name in the list that `models.experts` holds.
    pairs = ((name, other) for name, others in each_module(named).items() for other in sorted(others))
    assert [f"{name} names {other}" for name, other in pairs if layer(name) < layer(other)] == []

def test_imports_form_no_cycle() -> None:
    try: TopologicalSorter(each_module(imported)).prepare()
    except CycleError as e: pytest.fail("a cycle of imports: " + " → ".join(e.args[1]))

def notebook_numbers() -> dict[str, tuple[str, int]]:
    "Each module with the folder and the number of its notebook."
    numbers = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        exported = re.search(r"#\|\s*default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
        number = re.match(r"\d+", path.name)
        if exported and number: numbers[exported[1]] = path.parent.relative_to(ROOT / "nbs").as_posix(), int(number[0])
    return numbers

def test_notebooks_of_a_folder_are_numbered_in_the_order_of_imports() -> None:
    numbers, wrong = notebook_numbers(), []
    for name, others in each_module(imported).items():
        if name not in numbers: continue
        place, number = numbers[name]
        wrong += [f"{name} ({number}) imports {other} ({numbers[other][1]})" for other in sorted(others)
                  if other in numbers and numbers[other][0] == place and numbers[other][1] >= number]
    assert wrong == []

def test_a_notebook_is_named_after_its_module() -> None:
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    wrong = []
    for path in notebooks:
        exported = re.search(r"#\|\s*default_exp\s+([\w.]+)", path.read_text(encoding="utf-8"))
        if exported and "__" not in exported[1] and not re.fullmatch(rf"\d+_{exported[1].split('.')[-1]}", path.stem):
            wrong.append(f"{path.name} exports {exported[1]}")
    assert wrong == []

def light_set() -> list[str]:
    "The distributions that requirements/serve.txt pins."
    lines = (ROOT / "requirements" / "serve.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("==")[0] for line in lines if "==" in line]

# Imports a module in a process that finds only the distributions named after it.
ALONE = """
import importlib, re, sys
from importlib.metadata import packages_distributions
module, *allowed = sys.argv[1:]
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
allowed = {*allowed, "rakuten-nb"}
absent = {p for p, names in packages_distributions().items() if not {plain(d) for d in names} & allowed}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in absent: return
        raise ModuleNotFoundError(f"No module named {name!r} in the light set", name=name)
sys.meta_path.insert(0, Absent())
importlib.import_module(module)
"""
LOADED = "import importlib, sys; importlib.import_module(sys.argv[1]); print(*{n.split('.')[0] for n in sys.modules})"

def python(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    "Run Python code in a process of its own, at the project's root."
    return subprocess.run([sys.executable, "-c", source, *args], cwd=ROOT, capture_output=True, text=True, check=False)

light = pytest.mark.parametrize("module", LIGHT)

@light
def test_serving_loads_no_training_library(module: str) -> None:
    answer = python(LOADED, module)
    assert answer.returncode == 0, answer.stderr
    assert HEAVY & set(answer.stdout.split()) == set()

@light
def test_serving_needs_the_light_set_only(module: str) -> None:
    answer = python(ALONE, module, *light_set())
    assert answer.returncode == 0, answer.stderr

def test_the_light_set_has_no_plotting_library() -> None:
    assert "in the light set" in python(ALONE, "matplotlib", *light_set()).stderr

def test_the_package_writes_and_reads_no_pickle() -> None:
    pickles = re.compile(r"^\s*(import|from)\s+(pickle|cloudpickle|joblib|dill|shelve)\b|allow_pickle\s*=\s*True", re.M)
    # One module reads a PyTorch file of weights, which is a pickle, and admits listed names only.
    found = [name for name, path in SOURCES.items() if pickles.search(path.read_text(encoding="utf-8"))]
    assert found in ([], ["models.backbone"])
