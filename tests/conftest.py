"Marks, missing system packages, and fixtures that several tests share."
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from api_process import ApiProcess
    from fork_server import ForkServer
    from pipeline_copy import RunInProject
    from servers import Postgres, RedisServer

ROOT = Path(__file__).resolve().parents[1]
SLOWER = ("services", "heavy")
LACKS = "needs the Debian package "

def find_program(name: str) -> str | None:
    "The path of a program: on PATH, or in Debian's folders of PostgreSQL, newest version first."
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)
    paths = (shutil.which(name, path=str(folder)) for folder in folders)
    return shutil.which(name) or next((path for path in paths if path), None)

def needs(command: str, package: str | None = None) -> pytest.MarkDecorator:
    "Skip the test where `command` is not installed, and name its Debian package."
    return pytest.mark.skipif(find_program(command) is None, reason=f"{LACKS}{package or command}")

@pytest.fixture(scope="session")
def root() -> Path:
    "The folder of settings.ini."
    return ROOT

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Mark a test without another mark as fast, before `-m fast` selects."
    for item in items:
        if not any(item.get_closest_marker(mark) for mark in SLOWER): item.add_marker("fast")

def skip_reasons(config: pytest.Config) -> list[str]:
    "The reason of each skipped test."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return [r.longrepr[2] if isinstance(r.longrepr, tuple | list) else str(r.longrepr) for r in reports]

def skips_forbidden() -> bool:
    "Whether a skipped test fails the run, as in continuous integration."
    return os.environ.get("RAKUTEN_FORBID_SKIPS", "") not in ("", "0")

def pytest_sessionfinish(session: pytest.Session) -> None:
    "Fail a run with skipped tests where skips are forbidden."
    passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if passed and skips_forbidden() and skip_reasons(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    "Print one line for each missing system package, with the command that installs it."
    yield
    reasons = skip_reasons(terminalreporter.config)
    packages = Counter(m[1] for r in reasons if (m := re.search(re.escape(LACKS) + r"(\S+)", r)))
    for package, n in sorted(packages.items()):
        terminalreporter.write_line(f"{n} skipped, a system package is missing: apt-get install {package}", yellow=True)
    if reasons and skips_forbidden():
        line = f"{len(reasons)} skipped, and RAKUTEN_FORBID_SKIPS is set: this run fails"
        terminalreporter.write_line(line, red=True)

# --- created once in a run and shared by its workers

@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder that all workers of this run share."
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

def once(folder: Path, make: Callable[[Path], object]) -> Path:
    "The folder, filled by `make` unless another worker has done so; it appears complete or not at all."
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder

Run = Callable[..., subprocess.CompletedProcess[str]]

@pytest.fixture(scope="session")
def env(shared: Path) -> dict[str, str]:
    "The environment of processes that tests start: the package of this tree; caches, logs and bytecode outside it."
    own = {"PYTHONPATH": str(ROOT), "RAKUTEN_DATA_DIR": str(shared / "data"), "RAKUTEN_LOG_DIR": str(shared / "logs"),
           "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
           "PYTHONPYCACHEPREFIX": str(shared / "bytecode")} # without bytecode a start takes three times as long
    private = ("RAKUTEN_", "MLFLOW_", "DAGSHUB_", "AWS_", "PYTHONDONTWRITEBYTECODE")
    return {k: v for k, v in os.environ.items() if not k.startswith(private)} | own

@pytest.fixture(scope="session")
def python(env: dict[str, str], shared: Path) -> Run:
    "Runs Python outside the project, in the environment `env` and `extra`, and returns output and exit code."
    def run(
        *args: object, extra: dict[str, str] | None = None, program: Path | str = sys.executable,
    ) -> subprocess.CompletedProcess[str]:
        command = [program, *map(str, args)]
        return subprocess.run(command, env=env | (extra or {}), cwd=shared, capture_output=True, text=True, check=False)
    return run

@pytest.fixture(scope="session")
def fork_server(env: dict[str, str]) -> Iterator["ForkServer"]:
    "A process that has imported the command line."
    from fork_server import ForkServer
    server = ForkServer(env)
    yield server
    server.close()

@pytest.fixture(scope="session")
def rakuten(fork_server: "ForkServer", env: dict[str, str], shared: Path) -> Run:
    "Runs the command line in a process of its own, forked from one that has imported it."
    def run(*args: object, extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return fork_server.run(args, env | (extra or {}), shared)
    return run

@pytest.fixture(scope="session")
def sample_catalog(shared: Path) -> Path:
    "400 labelled products and 40 more, most with a picture."
    from rakuten_nb.data.sample import make_sample
    return once(shared / "sample", lambda part: make_sample(part, 400, progress=False))

@pytest.fixture(scope="session")
def hard_catalog(shared: Path) -> Path:
    "Fifty products that are hard to decode consistently."
    from hard_products import write_hard_products
    return once(shared / "hard", write_hard_products)

@pytest.fixture(scope="session")
def trained(shared: Path, sample_catalog: Path, hard_catalog: Path, python: Run) -> Path:
    "A trained bundle/, its process's predictions of the hard products (predictions.npz), and out_of_fold/."
    def make(part: Path) -> None:
        answer = python(ROOT / "tests/train_and_predict.py", sample_catalog, hard_catalog, part)
        assert answer.returncode == 0, answer.stderr
    return once(shared / "trained", make)

@pytest.fixture(scope="session")
def bundle(trained: Path) -> Path:
    "A bundle of both experts, trained on the sample of 400."
    return trained / "bundle"

# --- the pipeline

@pytest.fixture(scope="session")
def run_in_project(env: dict[str, str]) -> "RunInProject":
    "Runs a command in a copy of the project, with the copy's package; `extra` adds to the environment."
    programs = Path(sys.executable).parent
    settings = {"PATH": f"{programs}:{env['PATH']}", "DVC_NO_ANALYTICS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    def run(
        project: Path, command: str, *args: object, extra: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        own = env | settings | {"PYTHONPATH": str(project)} | (extra or {})
        words = [programs / command, *map(str, args)]
        return subprocess.run(words, cwd=project, env=own, capture_output=True, text=True, check=False)
    return run

@pytest.fixture(scope="session")
def finished_project(shared: Path, bundle: Path, run_in_project: "RunInProject") -> Path:
    "A folder with project/, in which the pipeline has run once, and repro.txt, the output of that run."
    # `bundle` is requested for its side effect: the exported backbone is in the cache.
    from pipeline_copy import make_project
    def make(part: Path) -> None:
        make_project(part / "project")
        answer = run_in_project(part / "project", "dvc", "repro")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        (part / "repro.txt").write_text(answer.stdout + answer.stderr, encoding="utf-8")
    return once(shared / "finished_project", make)

@pytest.fixture
def project(finished_project: Path, tmp_path: Path) -> Path:
    "A copy of the finished project that a test may change."
    return Path(shutil.copytree(finished_project / "project", tmp_path / "project", symlinks=True))

# --- the API

@pytest.fixture(scope="session")
def api(shared: Path, env: dict[str, str], bundle: Path, worker_id: str) -> Iterator["ApiProcess"]:
    "A running API with a user, a reviewer and an admin; one for each worker of this run."
    from api_process import USERS, ApiProcess
    with ApiProcess(env, shared / f"api-{worker_id}", bundle) as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture
def own_api(tmp_path: Path, env: dict[str, str], bundle: Path) -> Iterator["ApiProcess"]:
    "An API for one test, not started yet; its bundle is a copy that may be changed."
    from api_process import ApiProcess
    own = ApiProcess(env, tmp_path / "api", Path(shutil.copytree(bundle, tmp_path / "api/bundle")))
    yield own
    own.__exit__()

# --- PostgreSQL and Redis; mark such a test `services`, and `needs_postgres` or `needs_redis`

needs_postgres, needs_redis = needs("postgres", "postgresql"), needs("redis-server")

@pytest.fixture(scope="session")
def postgres_server() -> Iterator["Postgres"]:
    "A running PostgreSQL; a test that stops it starts it again."
    from servers import Postgres
    with Postgres() as running: yield running

@pytest.fixture
def postgres(postgres_server: "Postgres") -> str:
    "The URL of an empty database."
    return postgres_server.new_database()

@pytest.fixture(scope="session")
def redis_server() -> Iterator["RedisServer"]:
    "A running Redis; a test that stops it starts it again."
    from servers import RedisServer
    with RedisServer() as running: yield running

@pytest.fixture
def redis(redis_server: "RedisServer") -> str:
    "The URL of an empty Redis."
    with redis_server.client() as c: c.flushall()
    return redis_server.url
