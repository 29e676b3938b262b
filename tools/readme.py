"""Write README.md from nbs/index.ipynb, without Quarto; `--check` only compares them."""
import difflib
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"
CALLOUT = re.compile(r"^::: *\{\.callout-(note|tip|important|warning|caution)[^}]*\}\n(.*?)\n:::$", re.M | re.S)
LINK = re.compile(r"(!?\[[^\]\n]*\]\()(?![a-z]+:|#|/)([^)\s]+)(\))")
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|export|include:\s*false)\b", re.M)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)

def from_root(text: str, folder: str = "nbs") -> str:
    "The Markdown of a page in `folder`: call-outs in GitHub's syntax, links relative to the root."
    quoted = lambda body: "\n".join(f"> {line}".rstrip() for line in body.strip().splitlines())
    text = CALLOUT.sub(lambda m: f"> [!{m[1].upper()}]\n{quoted(m[2])}", text)
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])) + m[3], text)

def visible(cell: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    "A cell for the README; None if it is hidden."
    if cell.cell_type == "markdown": cell.source = from_root(cell.source)
    if cell.cell_type != "code": return cell
    if HIDDEN.search(cell.source): return None
    echo = not re.search(r"^#\|\s*echo:\s*false\b", cell.source, re.M)
    cell.source = DIRECTIVE.sub("", cell.source).strip() if echo else ""
    cell.outputs = [o for o in cell.outputs if o.output_type != "stream" or o.name != "stderr"]
    for output in cell.outputs:  # of a table, GitHub shows the Markdown
        if "text/markdown" in output.get("data", {}): output.data = {"text/markdown": output.data["text/markdown"]}
    return cell if cell.source or cell.outputs else None

def render(index: Path = INDEX) -> str:
    "The README for the notebook `index`."
    nb = nbformat.read(index, as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [shown for cell in nb.cells if (shown := visible(cell))]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"^```(?:python)?\n\s*```\n", "", body, flags=re.M)  # what is left of a cell whose code is not shown
    note = "<!-- written from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"

if __name__ == "__main__":
    expected = render()
    if "--check" not in sys.argv[1:]: README.write_text(expected, encoding="utf-8")
    else:
        text = README.read_text(encoding="utf-8") if README.exists() else ""
        names = {"fromfile": "README.md", "tofile": "nbs/index.ipynb", "lineterm": ""}
        diff = list(difflib.unified_diff(text.splitlines(), expected.splitlines(), **names))
        if diff: sys.exit("\n".join([*diff, "README.md differs from nbs/index.ipynb: run `make readme`"]))
