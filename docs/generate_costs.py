"""Writes the table of costs in docs/estimators.md from benchmarks/results/: ``python docs/generate_costs.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "estimators.md"
BEGIN, END = "<!-- costs: begin -->\n", "<!-- costs: end -->"

_LSTM, _GRU = (f"{layer} 650 → 650, T = 35, batch 20, all weights" for layer in ("LSTM", "GRU"))
#: Each row of the table: what it is, the file, the race, and the noise whose scale has a gradient.
ROWS = (
    ("linear, 8,192 rows of 784 → 512", "linear", "[8192, 784] → 512", "learnable"),
    ("linear, 128 rows of 1,024 → 1,024", "linear", "[128, 1024] → 1024", "learnable"),
    ("convolution 64 → 64, 3×3, 64 images", "conv", "64 → 64, 3×3", "learnable"),
    ("GPT-2's blocks, 8 × 128 tokens", "attention", "GPT-2 blocks", "relative"),
    ("LSTM 650, 20 sequences of 35", "recurrent", _LSTM, "learnable"),
    ("GRU 650, 20 sequences of 35", "recurrent", _GRU, "learnable"),
)


def _cell(name: str, race: str, contestant: str, column: str) -> Any:
    """One number of ``benchmarks/results``."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    first = ("contestant", "layer")
    return next(r["cells"][column] for r in rows if r["name"] == race and contestant in (r["cells"].get(key) for key in first))


def section() -> str:
    """The section as it should be."""
    lines = ["| a training step, over that of the plain layer | fixed scale | scale with a gradient |", "|---|---|---|"]
    for what, name, race, kind in ROWS:
        ratios = [_cell(name, race, f"flipout, {scale} Gaussian", "ratio") for scale in ("fixed", kind)]
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
        f"Shared noise on a language model's LSTM of 1,000 units takes {shared:.2f} times the plain step. Evolution of a net",
        f"of 669,706 weights takes {low_rank:.2f} times flipout's time under `LowRank(1)`, and {explicit:.0f} times where each",
        f"member has dense noise. What flipout keeps for the backward pass is {linear:.2f} times the plain layer's in the first",
        f"row and {conv:.2f} times in the third.",
        "",
    ]
    return "\n".join(lines)


def page() -> str:
    """The page with its section as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: section(), text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
