"""``python -m benchmarks``: runs the benchmarks and writes their results into ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import MIN_ROUNDS, PATIENCE
from benchmarks.report import Section

NAMES = ["linear", "conv", "memory", "overhead", "imports", "compiled", "recurrent", "below", "attention", "language", "evolution"]
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
RESULTS = ROOT / "benchmarks" / "results"


def insert(page: str, section: Section) -> str:
    """The page with the text between the section's markers replaced, or the section at its end."""
    begin, end = (f"<!-- {section.name}: {edge} -->" for edge in ("begin", "end"))
    block = f"{begin}\n{section.markdown()}{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(page):
        return pattern.sub(lambda _: block, page)
    return f"{page.rstrip()}\n\n{block}\n"


def available() -> list[str]:
    return [name for name in NAMES if importlib.util.find_spec(f"benchmarks.{name}") is not None]


def result(name: str, rounds: int, patience: float) -> Section:
    """What ``run`` of the file returns; the printed text of a file that has none."""
    module = importlib.import_module(f"benchmarks.{name}")
    if hasattr(module, "run"):
        section: Section = module.run(rounds, patience)
        return section
    section = Section(name, f"{name.capitalize()}", "")
    command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", str(rounds)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    section.text = f"{(module.__doc__ or '').splitlines()[0]}\n\n```text\n{printed.rstrip()}\n```"
    return section


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which to run: {', '.join(available())} (default: all)")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help=f"rounds of a race, at least {MIN_ROUNDS}")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a race may wait for a quiet machine")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown page to rewrite between its markers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON of every number")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - set(available())
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(available())}")
    chosen.results.mkdir(parents=True, exist_ok=True)
    for name in chosen.names or available():
        section = result(name, chosen.rounds, chosen.patience)
        print(section.markdown(), flush=True)
        written = json.dumps(section.json(), indent=2, ensure_ascii=False)
        (chosen.results / f"{name}.json").write_text(written + "\n", encoding="utf-8")
        page = chosen.page.read_text(encoding="utf-8") if chosen.page.exists() else "# Benchmarks\n"
        chosen.page.write_text(insert(page, section), encoding="utf-8")


if __name__ == "__main__":
    main()
