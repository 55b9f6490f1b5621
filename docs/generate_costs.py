"""Writes the table of costs in docs/estimators.md from benchmarks/results/: ``python docs/generate_costs.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "estimators.md"
BEGIN, END = "<!-- costs: begin -->\n", "<!-- costs: end -->"

#: Each row of the table: what it is, the file, the race, and the contestants with a fixed scale and with one that has a gradient.
ROWS = (
    ("linear, 8,192 rows of 784 → 512", "linear", "[8192, 784] → 512", "fixed Gaussian", "learnable Gaussian"),
    ("linear, 128 rows of 1,024 → 1,024", "linear", "[128, 1024] → 1024", "fixed Gaussian", "learnable Gaussian"),
    ("convolution 64 → 64, 3×3, 64 images", "conv", "64 → 64, 3×3", "fixed Gaussian", "learnable Gaussian"),
    ("GPT-2's blocks, 8 × 128 tokens", "attention", "GPT-2 blocks", "fixed Gaussian", "relative Gaussian"),
    ("LSTM 650, 20 sequences of 35", "recurrent", "LSTM 650 → 650, T = 35, batch 20, all weights", "fixed Gaussian", "learnable Gaussian"),
    ("GRU 650, 20 sequences of 35", "recurrent", "GRU 650 → 650, T = 35, batch 20, all weights", "fixed Gaussian", "learnable Gaussian"),
)  # fmt: skip


def _cell(name: str, race: str, contestant: str, column: str) -> Any:
    """One number of ``benchmarks/results``."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    first = ("contestant", "layer")
    return next(r["cells"][column] for r in rows if r["name"] == race and contestant in (r["cells"].get(key) for key in first))


def section() -> str:
    """The section as it should be."""
    lines = ["| a training step, over that of the plain layer | fixed scale | scale with a gradient |", "|---|---|---|"]
    for what, name, race, *kinds in ROWS:
        ratios = [_cell(name, race, f"flipout, {kind}", "ratio") for kind in kinds]
        lines.append(f"| {what} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    shared = _cell("language", "1×1000, 100 characters, batch 32", "shared Gaussian", "ratio")
    low_rank = _cell("evolution", "1 example a member", "LowRank(1)", "/ FlipES")
    explicit = _cell("evolution", "1 example a member", "explicit", "/ FlipES")
    linear, conv = (
        _cell("memory", layer, "learnable", "/ plain")
        for layer in ("linear [8192, 784] → 512", "conv2d 64 → 64, 3×3, [64, 64, 32, 32]")
    )
    lines += [
        "",
        f"Shared noise on a language model's LSTM of 1,000 units takes {shared:.2f} times the plain step. Evolution of a net of 669,706 weights takes",
        f"{low_rank:.2f} times flipout's time under `LowRank(1)`, and {explicit:.0f} times where each member has dense noise. What flipout keeps for the",
        f"backward pass is {linear:.2f} times the plain layer's in the first row and {conv:.2f} times in the third.",
        "",
    ]
    return "\n".join(lines)


def page() -> str:
    """The page with its section as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: section(), text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
