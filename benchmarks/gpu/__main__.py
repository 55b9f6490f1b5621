"""``python -m benchmarks.gpu``: runs the sections by priority, saves each, and writes a run folder."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import laws, slices, speed
from benchmarks.gpu.tables import show, table
from flipout.errors import ArgumentError
from flipout_experiments.harness.run import Run

__all__ = ["main"]

Section = Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class GpuSettings:
    """What the folder's numbers depend on."""

    device: str
    quick: bool
    data_dir: Path | None


def _sections(settings: GpuSettings, run: Run) -> dict[str, Section]:
    """By priority: what comes last is left out first."""
    device, quick, data = torch.device(settings.device), settings.quick, settings.data_dir
    return {
        "laws": lambda: laws.laws(device, quick),
        "layers": lambda: speed.layers(device, quick),
        "transformer": lambda: speed.transformer(device, quick),
        "evolution": lambda: speed.evolution(device, quick),
        "figure-1-fc": lambda: slices.variance("fc", device, quick, run, data),
        "table-3-wd-flipout": lambda: slices.language("word", "wd-flipout", device, quick, data),
        "table-3-none": lambda: slices.language("word", "none", device, quick, data),
        "table-2-gaussian-flipout": lambda: slices.language("char", "gaussian-flipout", device, quick, data),
        "figure-1-convle": lambda: slices.variance("convle", device, quick, run, data),
        "figure-1-convgg": lambda: slices.variance("convgg", device, quick, run, data),
    }


def _run_section(name: str, section: Section, run: Run) -> list[dict[str, Any]]:
    """A section's tables, from an earlier process or now; one that cannot run says why in a table of its own."""
    kept = run.load_checkpoint(f"section-{name}")
    if kept is not None:
        return json.loads(kept["tables"])  # type: ignore[no-any-return]
    try:
        with contextlib.nullcontext() if name.startswith("figure") else run.phase(name):  # which has phases of its own
            found = section()
    except ArgumentError as error:  # data that are not there
        found = [table(name, ["section", "left out"], [[name, str(error).splitlines()[0]]])]
    except Exception as error:
        traceback.print_exc()
        found = [table(name, ["section", "verdict", "error"], [[name, "FAILS", f"{type(error).__name__}: {error}"[:300]]])]
    run.save_checkpoint(f"section-{name}", {"tables": json.dumps(found)})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what there is time for.

    Returns:
        1 if a law or a section failed, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal, whose figures mean nothing")
    parser.add_argument("--minutes", type=float, default=20.0, help="no section begins after so many, over all processes together")
    parser.add_argument("--data-dir", type=Path, help="data sets in their official formats")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", nargs="+", default=(), help="names of sections; the others are left out")
    asked = parser.parse_args(arguments)
    settings = GpuSettings(asked.device, asked.quick, None if asked.data_dir is None else asked.data_dir.resolve())
    with Run.open(asked.out, "gpu", settings, resume=(asked.out / "config.json").exists()) as run:
        if run.finished:
            tables = run.result["tables"]
        else:
            tables, left, before, began = [], [], sum(run.seconds.values()), time.perf_counter()
            for name, section in _sections(settings, run).items():
                late = before + time.perf_counter() - began > 60 * asked.minutes
                if late or (asked.only and name not in asked.only):
                    left.append([name, "no time was left" if late else "not asked for"])
                    continue
                for each in _run_section(name, section, run):
                    tables.append(each)
                    print(show(each), flush=True)
            if left:
                tables.append(table("Left out", ["section", "why"], left))
                print(show(tables[-1]), flush=True)
            run.finish({"tables": tables})
    failed = sum(cell == "FAILS" for each in tables for row in each["rows"] for cell in row)
    print(f"{asked.out / 'result.json'}: {failed} failed" if failed else f"{asked.out / 'result.json'}: all laws hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
