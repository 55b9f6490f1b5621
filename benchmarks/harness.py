"""Races: contestants timed side by side in one process.

A machine's speed drifts, so no two timings taken apart are compared. In each round every contestant runs once, in an order that
rotates from round to round; a ratio is the median over rounds of the contestant's time over the baseline's time in the same
round, and its spread the interquartile range of these ratios.

Other processes on the machine slow what uses two threads more than what uses one, and so bend ratios too. Where the system
tells (Linux), blocks of rounds during which others used more than a twentieth of it are set aside, and the race waits for quiet
up to a limit; past that the disturbed rounds are used as well, and the table shows how busy the others were.

On a machine that is never quiet, BENCH_CLOCK=thread times the processor seconds of the main thread instead of seconds by the
clock. With OMP_WAIT_POLICY=PASSIVE, where a thread that waits for another uses none, that is what a quiet machine's clock would
show but for the moments in which threads are woken; what others do to the shared caches is still in it.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CLOCK", "MIN_ROUNDS", "PATIENCE", "THREADS", "Timing", "forward_backward", "race"]

THREADS = 2
CLOCK = os.environ.get("BENCH_CLOCK", "wall")
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
        seconds: one time a round, of all its calls together.
        others: the share of the machine that other processes used meanwhile; None where the system does not tell.
    """

    milliseconds: float
    ratio: float
    low: float
    high: float
    rounds: int
    seconds: tuple[float, ...]
    others: float | None = None

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Quartiles of this contestant's time over another's, round by round: low, median, high."""
        return _quartiles(self.seconds, other.seconds)


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
        block: list[dict[str, float]] = []
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
    clock = {"wall": time.perf_counter, "thread": time.thread_time}[CLOCK]
    start = clock()
    for _ in range(calls):
        function()
    return clock() - start


def _summary(seconds: list[float], reference: list[float], calls: int, others: float | None) -> Timing:
    low, middle, high = _quartiles(seconds, reference)
    return Timing(1e3 * statistics.median(seconds) / calls, middle, low, high, len(seconds), tuple(seconds), others)


def _quartiles(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


class _Load:
    """What other processes (and the hypervisor) use of the machine, from now on."""

    def __init__(self) -> None:
        self._start, self._own, self._busy = time.perf_counter(), _own_seconds(), _busy_seconds()

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def others(self) -> float | None:
        """Their share of all cores since the start, 0 to 1; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        foreign = busy - self._busy - (_own_seconds() - self._own)
        return max(foreign, 0.0) / (self.seconds() * (os.cpu_count() or 1))


def _own_seconds() -> float:
    """Processor seconds of this process, and of those that it started and waited for."""
    return sum(os.times()[:4])


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
