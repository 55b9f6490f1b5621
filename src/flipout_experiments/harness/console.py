"""What the commands have in common on the terminal: bars with the time that is left, and numbers with their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from flipout.intervals import Estimate

if TYPE_CHECKING:
    from flipout_experiments.harness.run import Progress

__all__ = ["Count", "interval", "progress_bars", "spread"]


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """A progress bar for each phase that reports, with the time it has taken and the time it has left."""
    columns = [
        TextColumn("{task.description:<21}"), BarColumn(bar_width=22), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    ]  # fmt: skip
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console) as bars:

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


class Count:
    """Tells a progress display how many of ``total`` steps are done, each time it is called."""

    def __init__(self, report: Any, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._report(self._done, self._total)


def spread(estimate: Estimate) -> str:
    """A value and the upper half of its interval in per cent.

    Example:
        >>> spread(Estimate(2.0, 1.5, 3.0, 0.4, 9))
        '2 ±50 %'
    """
    if estimate.high == float("inf"):
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ±{100 * (estimate.high / estimate.value - 1):.0f} %"


def interval(estimate: Estimate, digits: int = 3) -> str:
    """A value and its interval.

    Example:
        >>> interval(Estimate(2.0, 1.5, 3.0, 0.4, 9)), interval(Estimate(1.2567, 1.25, 1.2634, 0.002, 2), digits=4)
        ('2 [1.5, 3]', '1.257 [1.25, 1.263]')
    """
    if estimate.high == float("inf"):
        return f"{estimate.value:.{digits}g}"
    return f"{estimate.value:.{digits}g} [{estimate.low:.{digits}g}, {estimate.high:.{digits}g}]"
