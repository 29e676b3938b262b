"Marks, and what a skipped test lacks."
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOWER = ("services", "heavy")
LACKS = "needs the Debian package "

def needs(command: str, package: str | None = None) -> pytest.MarkDecorator:
    "Skips the test where `command` is not installed, naming the Debian package that brings it."
    return pytest.mark.skipif(shutil.which(command) is None, reason=f"{LACKS}{package or command}")

@pytest.fixture(scope="session")
def root() -> Path:
    "The folder of settings.ini."
    return ROOT

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "What carries no other mark is fast. First, so that `-m fast` sees it."
    for item in items:
        if not any(item.get_closest_marker(mark) for mark in SLOWER): item.add_marker("fast")

def skip_reasons(config: pytest.Config) -> list[str]:
    "Why each skipped test was skipped."
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return [r.longrepr[2] if isinstance(r.longrepr, tuple | list) else str(r.longrepr) for r in reports]

def skips_forbidden() -> bool:
    "Whether a skipped test counts as a failed one, as it does in continuous integration."
    return os.environ.get("RAKUTEN_FORBID_SKIPS", "") not in ("", "0")

def pytest_sessionfinish(session: pytest.Session) -> None:
    "A run in which something was skipped fails where that is asked for."
    passed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    if passed and skips_forbidden() and skip_reasons(session.config): session.exitstatus = pytest.ExitCode.TESTS_FAILED

@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    "Last of all, one line for each missing system package, with the command that installs it."
    yield
    reasons = skip_reasons(terminalreporter.config)
    packages = Counter(m[1] for r in reasons if (m := re.search(re.escape(LACKS) + r"(\S+)", r)))
    for package, n in sorted(packages.items()):
        terminalreporter.write_line(f"{n} skipped for want of a system package: apt-get install {package}", yellow=True)
    if reasons and skips_forbidden():
        terminalreporter.write_line(f"{len(reasons)} skipped, and RAKUTEN_FORBID_SKIPS is set: this run fails", red=True)
