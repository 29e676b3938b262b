"The README equals the index notebook, links are valid, and the named commands exist."
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

README = ROOT / "README.md"
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|data:")

def tool() -> ModuleType:
    "tools/readme.py as a module."
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def pages() -> dict[str, tuple[Path, str]]:
    "The README and the Markdown of each notebook, with the folder that their links are relative to."
    texts = {"README.md": (ROOT, README.read_text(encoding="utf-8"))}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        texts[path.relative_to(ROOT).as_posix()] = (path.parent, "\n\n".join(source))
    return texts

PAGES = pages()

def links(text: str) -> list[str]:
    "The links of a page to files of this repository."
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return [target.split("#")[0] for target in LINK.findall(prose) if not ELSEWHERE.match(target)]

def code(text: str) -> str:
    "The code of a page: fences and back-ticks."
    return "\n".join([*FENCE.findall(text), *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))])

def test_the_readme_equals_the_index() -> None:
    assert README.read_text(encoding="utf-8") == tool().render(), "run `make readme`"

def test_callouts_and_links_are_rewritten_for_github() -> None:
    page = "::: {.callout-tip}\nread *on*\n:::\n\n[a](10_a.ipynb) ![b](../b.svg#x) [c](https://c.d) [e](#e)"
    text = tool().from_root(page)
    assert text == "> [!TIP]\n> read *on*\n\n[a](nbs/10_a.ipynb) ![b](b.svg#x) [c](https://c.d) [e](#e)"

@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_files(page: str) -> None:
    folder, text = PAGES[page]
    assert [target for target in links(text) if not (folder / target).exists()] == []

@pytest.mark.parametrize("page", PAGES)
def test_pages_link_to_notebooks_not_to_generated_pages(page: str) -> None:
    assert [target for target in links(PAGES[page][1]) if target.endswith((".html", ".qmd"))] == []

def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    make = re.compile(r"^\s*make ([a-z][a-z-]*)", re.M)
    named = {target for _, text in PAGES.values() for target in make.findall(code(text))}
    assert {"demo", "test"} <= named <= targets, named - targets

def test_named_commands_exist() -> None:
    from typer.main import get_command

    from rakuten_nb.cli import app
    commands = set(getattr(get_command(app), "commands", {}))
    named = set(re.findall(r"\brakuten-nb ([a-z][a-z-]*)", code(PAGES["README.md"][1])))
    assert named <= commands, named - commands
