"""Measured figures of README and guides, in nbs/figures.json: each section has rows, the command and the commit.

    tools/figures.py bundle SECTION BUNDLE…     metrics of `rakuten-nb train` or of the pipeline, from bundle.json
    tools/figures.py bench BENCH.json…          latency, start and memory, from `rakuten-nb bench --json`

Run it after a measurement; then execute the pages that show the figures and run `make readme`.
"""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "nbs" / "figures.json"
NAMES = {"text_linear": "text, linear", "text_ngrams": "text, n-gram network", "text_lstm": "the course's LSTM",
         "text_sentence": "sentence embeddings", "image": "picture", "fused": "fused"}
Row = dict[str, str]

def provenance(command: str) -> dict[str, str]:
    "What produced a section."
    ask = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
    machine = f"{os.cpu_count()} processors, Python {platform.python_version()}"
    return {"command": command, "commit": commit.stdout.strip(), "machine": machine}

def score(metrics: dict[str, Any]) -> str:
    "Weighted F1 with its interval and the number of products."
    low, high = metrics["weighted_f1_interval"]
    return f"{metrics['weighted_f1']:.3f} ({low:.3f} – {high:.3f}), {metrics['n']:,} products"

def bundle_rows(bundle: Path) -> list[Row]:
    "One row for each expert of a bundle, the fused prediction last."
    metrics = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["metrics"]
    parts = {part: metrics[part]["experts"] | {"fused": metrics[part]["fused"]} for part in ("out_of_fold", "gold")}
    return [{"expert": NAMES.get(name, name), "out of fold": score(values), "gold": score(parts["gold"][name])}
            for name, values in parts["out_of_fold"].items()]

def bench_rows(files: list[Path]) -> list[Row]:
    "One row for each quantity; several runs side by side."
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    def each(text: str, values: list[float]) -> str: return " and ".join(text.format(v) for v in values)
    latency = [median(r["ours_ms"]) for r in runs]
    return [{"measure": "median latency, title and picture", "value": each("{:.0f} ms", latency)},
            {"measure": "the reference networks", "value": each("{:.1f} times as long", [r["ratio"] for r in runs])},
            {"measure": "start to ready", "value": each("{:.1f} s", [r["ready_seconds"] for r in runs])},
            {"measure": "memory", "value": f"{mean(r['memory_mb'] for r in runs):.0f} MB"},
            {"measure": "eight clients", "value": each("{:.0f} a second", [r["crowd_per_second"] for r in runs])}]

def main(arguments: list[str]) -> None:
    "Update one section of figures.json."
    match arguments:
        case ["bundle", section, path]:
            rows, command = bundle_rows(Path(path)), f"tools/figures.py bundle {section}"
        case ["bench", *paths] if paths:
            section, rows, command = "service", bench_rows([*map(Path, paths)]), "rakuten-nb bench"
        case _: sys.exit(__doc__)
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    figures[section] = provenance(command) | {"rows": rows}
    FIGURES.write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{FIGURES.relative_to(ROOT)}: section {section}, {len(rows)} rows")

if __name__ == "__main__": main(sys.argv[1:])
