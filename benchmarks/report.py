"""The record of a benchmark: its table, its targets met or missed, and the machine, as Markdown and as plain data."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import CLOCK, THREADS, Timing

__all__ = ["Row", "Section", "Target", "environment"]


@dataclass(frozen=True)
class Target:
    """A bound on a measured number."""

    what: str
    value: float
    bound: float
    at_least: bool = False
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(frozen=True)
class Row:
    """One setting of a benchmark: what was run, and cells of text or numbers by column."""

    name: str
    cells: dict[str, Any]


@dataclass
class Section:
    """The result of one benchmark file.

    Attributes:
        name: the file's name.
        title: a heading.
        text: what was measured and how, in Markdown.
        rows: one table row each; all have the same columns.
        seconds: of each race the time of every round, by contestant.
        targets: bounds, met or missed.
        notes: what a reader should know besides, such as skipped peers.
        environment: the machine, filled in when the section is made.
    """

    name: str
    title: str
    text: str
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def add_race(self, name: str, timings: Mapping[str, Timing]) -> None:
        """Adds one table row a contestant."""
        self.seconds[name] = {contestant: t.seconds for contestant, t in timings.items()}
        for contestant, t in timings.items():
            cells = {"contestant": contestant, "ms": t.milliseconds, "ratio": t.ratio, "quartiles": f"{t.low:.2f} – {t.high:.2f}"}
            others = "?" if t.others is None else f"{100 * t.others:.0f} %"
            self.rows.append(Row(name, {**cells, "rounds": t.rounds, "others": others}))

    def add_target(self, what: str, timing: Timing, bound: float) -> None:
        """A bound from above on a contestant's ratio to the baseline."""
        self.targets.append(Target(what, timing.ratio, bound, spread=(timing.low, timing.high)))

    def add_lead(self, what: str, slower: Timing, faster: Timing, bound: float) -> None:
        """A bound from below on how many times as long another contestant takes."""
        low, middle, high = slower.over(faster)
        self.targets.append(Target(what, middle, bound, at_least=True, spread=(low, high)))

    def markdown(self) -> str:
        """Heading, machine, table, targets and notes."""
        parts = [f"## {self.title}", self.text, f"*{describe(self.environment)}*"]
        if self.rows:
            columns = ["", *self.rows[0].cells]
            parts.append(table(columns, [[row.name, *row.cells.values()] for row in self.rows]))
        if self.targets:
            header = ["target", "measured", "quartiles", "bound", ""]
            parts.append(table(header, [_target_cells(target) for target in self.targets]))
        if self.notes:
            parts.append("\n".join(f"* {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {**asdict(self), "targets": [{**asdict(t), "met": t.met} for t in self.targets]}


def _target_cells(target: Target) -> list[str]:
    spread = f"{target.spread[0]:.2f} – {target.spread[1]:.2f}" if target.spread else ""
    sign = "≥" if target.at_least else "≤"
    return [target.what, _cell(target.value), spread, f"{sign} {target.bound:g}", "met" if target.met else "**missed**"]


def environment() -> dict[str, Any]:
    """The machine and the versions, with the load it was under."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "load": load,
        "clock": CLOCK,
        "wait policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flipout": version_of("flipout"),
        "bayesian-torch": version_of("bayesian-torch"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def describe(env: Mapping[str, Any]) -> str:
    """One line on the machine."""
    load = "" if env["load"] is None else f", load average {env['load']:.1f} at the start"
    policy = "" if env["wait policy"] == "default" else f" (OMP_WAIT_POLICY={env['wait policy']})"
    clock = ", timed by the processor seconds of the main thread" if env["clock"] == "thread" else ""
    peer = f", bayesian-torch {env['bayesian-torch']}" if env["bayesian-torch"] else ""
    return (
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads{policy}, torch {env['torch']}, "
        f"Python {env['python']}{peer}{clock}; {env['date']}{load}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
