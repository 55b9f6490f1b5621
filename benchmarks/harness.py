"""Races: contestants timed side by side in one process, and the record of what came out.

A machine's speed drifts, so no two timings taken apart are compared. In each round every contestant runs once, in an order that
rotates from round to round; a ratio is the median over rounds of the contestant's time over the baseline's time in the same
round, and its spread the interquartile range of these ratios.
"""

from __future__ import annotations

import datetime
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Row", "Section", "Target", "Timing", "environment", "forward_backward", "race"]

THREADS = 2
MIN_ROUNDS = 15
#: The share of the machine that others may use in an undisturbed round.
QUIET = 0.05
#: Rounds are judged in blocks of about this many seconds, for the system counts in hundredths of a second.
BLOCK = 1.0
#: How long a race waits for others by default, in seconds.
PATIENCE = 60.0


@dataclass(frozen=True)
class Timing:
    """One contestant of a race.

    Attributes:
        milliseconds: median time of one call.
        ratio: median over rounds of its time over the baseline's.
        low, high: quartiles of that ratio.
        rounds: how many rounds.
        others: the share of the machine that other processes used meanwhile; None where the system does not tell.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    others: float | None = None


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
        targets: bounds, met or missed.
        notes: what a reader should know besides, such as skipped peers.
        environment: the machine, filled in when the section is made.
    """

    name: str
    title: str
    text: str
    rows: list[Row] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    def add_race(self, name: str, timings: Mapping[str, Timing]) -> None:
        """Adds one table row a contestant."""
        for contestant, t in timings.items():
            cells = {"contestant": contestant, "ms": t.milliseconds, "ratio": t.ratio, "quartiles": f"{t.low:.2f} – {t.high:.2f}"}
            others = "?" if t.others is None else f"{100 * t.others:.0f} %"
            self.rows.append(Row(name, {**cells, "rounds": t.rounds, "others": others}))

    def add_target(self, what: str, timing: Timing, bound: float) -> None:
        """A bound from above on a contestant's ratio to the baseline."""
        self.targets.append(Target(what, timing.ratio, bound, spread=(timing.low, timing.high)))

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


def race(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = MIN_ROUNDS,
    calls: int = 1,
    warmup: int = 2,
    baseline: str | None = None,
    patience: float = PATIENCE,
) -> dict[str, Timing]:
    """Times every contestant once a round, in rotating order.

    Args:
        contestants: functions without arguments, by name.
        rounds: at least 15.
        calls: calls timed together as one, for functions that take less than a millisecond.
        warmup: untimed calls (times ``calls``) of each contestant before the first round.
        baseline: the contestant that ratios refer to; by default the first.
        patience: seconds to spend on waiting and on rounds that others disturbed.

    Returns:
        A :class:`Timing` by contestant, in the order given.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds={rounds}: a median of fewer than {MIN_ROUNDS} rounds says little")
    torch.set_num_threads(THREADS)
    names = list(contestants)
    for name in names:
        for _ in range(warmup * calls):
            contestants[name]()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        seconds, others = _rounds(contestants, rounds, calls, patience)
    finally:
        if collecting:
            gc.enable()
    reference = [r[names[0] if baseline is None else baseline] for r in seconds]
    return {name: _summary([r[name] for r in seconds], reference, calls, others) for name in names}


def _rounds(
    contestants: Mapping[str, Callable[[], object]], rounds: int, calls: int, patience: float
) -> tuple[list[dict[str, float]], float | None]:
    """Seconds by contestant for each round, and the share of the machine that others used."""
    names = list(contestants)
    quiet: list[dict[str, float]] = []
    disturbed: list[tuple[float | None, dict[str, float]]] = []
    shares: list[float | None] = []
    turn = 0
    while len(quiet) < rounds:
        patience -= _wait_for_quiet(patience)
        load = _Load()
        block = []
        while len(block) < rounds - len(quiet) and (not block or load.seconds() < BLOCK):
            start = turn % len(names)
            times = {name: _time(contestants[name], calls) for name in names[start:] + names[:start]}
            block.append(times)
            turn += 1
        share = load.others()
        if share is None or share <= QUIET:
            quiet += block
            shares += [share] * len(block)
            continue
        disturbed += [(share, times) for times in block]
        patience -= load.seconds()
        if patience <= 0 and len(quiet) + len(disturbed) >= rounds:
            break
    if len(quiet) < rounds:
        shares += [share for share, _ in disturbed]
        quiet += [times for _, times in disturbed]
    known = [share for share in shares if share is not None]
    return quiet, statistics.mean(known) if known else None


def _time(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def _summary(seconds: list[float], reference: list[float], calls: int, others: float | None) -> Timing:
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(1e3 * statistics.median(seconds) / calls, middle, low, high, len(seconds), others)


class _Load:
    """What other processes (and the hypervisor) use of the machine, from now on."""

    def __init__(self) -> None:
        self._start, self._own, self._busy = time.perf_counter(), time.process_time(), _busy_seconds()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def others(self) -> float | None:
        """Their share of all cores since the start, 0 to 1; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = busy - self._busy - (time.process_time() - self._own)
        return max(foreign, 0.0) / (self.seconds() * (os.cpu_count() or 1))


def _busy_seconds() -> float | None:
    """Seconds of all cores that were not idle since boot (Linux)."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _wait_for_quiet(patience: float) -> float:
    """Waits until others leave the machine alone, at most ``patience`` seconds; returns the seconds waited."""
    waiting = _Load()
    while waiting.seconds() < patience:
        load = _Load()
        time.sleep(min(0.5, max(patience - waiting.seconds(), 0.0)))
        share = load.others()
        if share is None or share <= QUIET:
            break
    return waiting.seconds()


def forward_backward(net: nn.Module, *inputs: Tensor, **arguments: Any) -> Callable[[], None]:
    """A training step without the optimiser: forward, then backward from a fixed random gradient of the output.

    Gradients of parameters, noise scales and inputs that require one are all formed, anew at each call.
    """
    gradient: list[Tensor] = []
    leaves = [t for t in (*inputs, *net.parameters()) if t.requires_grad]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = net(*inputs, **arguments)
        y = y[0] if isinstance(y, tuple) else y
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])

    return step


def environment() -> dict[str, Any]:
    """The machine and the versions, with the load it was under."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "load": load,
        "wait policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flipout": _version("flipout"),
        "bayesian-torch": _version("bayesian-torch"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def describe(env: Mapping[str, Any]) -> str:
    """One line on the machine."""
    load = "" if env["load"] is None else f", load average {env['load']:.1f} at the start"
    policy = "" if env["wait policy"] == "default" else f" (OMP_WAIT_POLICY={env['wait policy']})"
    peer = f", bayesian-torch {env['bayesian-torch']}" if env["bayesian-torch"] else ""
    return (
        f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads{policy}, torch {env['torch']}, "
        f"Python {env['python']}{peer}; {env['date']}{load}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
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
