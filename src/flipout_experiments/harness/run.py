"""A run folder: what an experiment was asked, where it ran, its numbers as they came, its checkpoints, figures and result.

    config.json        the experiment, the preset and every setting
    environment.json   versions and machine; one more entry for each time the run went on
    metrics.jsonl      a JSON object a line, in the order of logging
    checkpoints/       what a killed run goes on from
    seconds.json       wall time of each phase so far, over all processes that worked on it
    figures/           each as PNG and SVG
    tensorboard/       on request
    result.json        written last: a folder that has it is a finished run

A process may be killed at any moment. :meth:`Run.open` with ``resume=True`` finds the last whole checkpoint, cuts from
``metrics.jsonl`` what was logged after it, and the experiment does that work again. So a run that was killed ends with the
same ``result.json``, but for seconds, and the same ``metrics.jsonl`` as one that was not, given the same machine and number of
threads (sums are rounded as they are cut), if the experiment keeps three habits:

* all state that the next step needs is in the checkpoint, the states of generators included;
* what is logged after the last checkpoint is logged again by the work that follows it, and nothing before it is;
* a file of its own under :meth:`Run.path` (the finished points of a curve, say) decides nothing but which work is left. Log such
  work when all of it is done, from its result.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flipout.errors import ArgumentError, SaveError
from flipout.storage.files import UNFINISHED, make_folder, plain, read_json, replace_file, write_json
from flipout_experiments.harness import folder as folders
from flipout_experiments.harness.checkpoints import metrics_kept, read_checkpoint, write_checkpoint
from flipout_experiments.harness.environment import describe_environment, find_device
from flipout_experiments.harness.lock import FolderLock
from flipout_experiments.harness.memory import shortage_told
from flipout_experiments.harness.metrics_file import Boards, MetricsFile, record_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Progress", "Run", "silent"]

#: Tells a progress display that so many of so many steps of a phase are done.
Progress = Callable[[str, int, int], None]

#: How often the seconds of a phase under way are saved, in seconds.
_SECONDS_EVERY = 5.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def silent(phase: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


class Run:
    """An open run folder; see the module for what is in it. Made by :meth:`open`.

    Attributes:
        folder: where it is.
        resumed: whether this process goes on with what another began.

    Example:
        >>> import dataclasses, tempfile
        >>> @dataclasses.dataclass(frozen=True)
        ... class Settings:
        ...     seed: int = 0
        >>> with tempfile.TemporaryDirectory() as folder, Run.open(Path(folder), "count", Settings()) as run:
        ...     with run.phase("count") as report:
        ...         state = run.load_checkpoint("count") or {"total": 0, "step": 0}
        ...         for step in range(state["step"], 3):
        ...             state = {"total": state["total"] + step, "step": step + 1}
        ...             run.log(step=step, total=state["total"])
        ...             run.save_checkpoint("count", state)
        ...             report(step + 1, 3)
        ...     result = run.finish({"total": state["total"]})
        >>> result["total"], list(result["seconds"])
        (3, ['count'])
    """

    def __init__(self, folder: Path, lock: FolderLock, metrics: MetricsFile, boards: Boards | None, resumed: bool) -> None:
        self.folder = folder
        self.resumed = resumed
        self._lock = lock
        self._metrics = metrics
        self._boards = boards
        self._config = read_json(folder / "config.json")
        self._seconds: dict[str, float] = read_json(folder / "seconds.json") if (folder / "seconds.json").exists() else {}
        self._phase: str | None = None
        self._since = self._saved = time.perf_counter()
        self._guard = threading.Lock()  # steps may be reported from several threads
        self._proven: set[str] = set()

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        experiment: str,
        settings: Any,
        resume: bool = False,
        tensorboard: bool = False,
        preset: str | None = None,
    ) -> Iterator[Run]:
        """Opens a run folder, new or to go on with.

        Args:
            folder: of the run; made with those above it if it is not there.
            experiment: its name, for ``config.json``.
            settings: a dataclass. Whatever the numbers depend on should be in it; a field ``device`` is tried out first.
            resume: go on with the run in the folder, which must have the same experiment, preset and settings.
            tensorboard: write TensorBoard's files too.
            preset: the name under which the settings are known.

        Raises:
            ArgumentError: if the folder holds a run and ``resume`` is False, or none and it is True; if its run has other
                settings; if it holds something else; if another process is at work in it; if the device is not there or
                tensorboard is not installed.
            SaveError: if nothing can be written there.
            OutOfMemoryError: instead of what torch and Python raise inside where memory does not suffice.
        """
        if tensorboard:
            Boards.check()
        device = find_device(getattr(settings, "device", "cpu"))
        config = {"experiment": experiment, "preset": preset, "settings": plain(settings)}
        folders.refuse_strangers(folder)
        folders.check_state(folder, resume)
        make_folder(folder)
        with contextlib.ExitStack() as stack:
            lock = FolderLock(folder)
            stack.callback(lock.close)
            folders.check_state(folder, resume)  # again, now that no other process can change it
            folders.clear_unfinished(folder)
            if resume:
                folders.compare_config(folder, config)
            else:
                write_json(folder / "config.json", config)
            if not (folder / "result.json").exists():
                folders.record_environment(folder, describe_environment(device))
            metrics = MetricsFile(folder / "metrics.jsonl", metrics_kept(folder))
            stack.callback(metrics.close)
            boards = Boards(folder / "tensorboard", list(metrics.records())) if tensorboard else None
            if boards is not None:
                stack.callback(boards.close)
            with shortage_told(folder):
                yield cls(folder, lock, metrics, boards, resume)

    @property
    def finished(self) -> bool:
        """Whether the result is there, so that nothing is left to do."""
        return (self.folder / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """What ``result.json`` holds.

        Raises:
            ArgumentError: if the run is not finished.
        """
        return read_json(self.folder / "result.json")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each phase so far, over all the processes that worked on it."""
        return {**self._seconds, **({self._phase: self._phase_seconds()} if self._phase is not None else {})}

    @contextmanager
    def phase(self, name: str, progress: Progress = silent) -> Iterator[Callable[[int, int], None]]:
        """Times a part of the experiment, shows how far it is, and names it in the metrics logged meanwhile.

        Yields:
            ``report(done, total)``, to be called as the steps of the phase are done, from any thread.

        Raises:
            ArgumentError: if another phase is under way, or the name is no plain file name.
            SaveError: if its seconds cannot be written.
        """
        if self._phase is not None:
            raise ArgumentError(f"phase {name!r} begins inside phase {self._phase!r}: phases follow one another")
        self._phase, self._since = _checked(name, "phase"), time.perf_counter()
        reported = False

        def report(done: int, total: int) -> None:
            nonlocal reported
            reported = True
            progress(name, done, total)
            with self._guard:
                if time.perf_counter() - self._saved > _SECONDS_EVERY:
                    self._save_seconds()

        progress(name, 0, 1)
        try:
            yield report
        except BaseException:
            with contextlib.suppress(SaveError):  # the first error tells more
                self._end_phase()
            raise
        self._end_phase()
        if not reported:
            progress(name, 1, 1)

    def log(self, *, step: int, **numbers: Any) -> None:
        """Adds a line to ``metrics.jsonl``: the phase, the step and the numbers. What is not finite becomes null.

        Args:
            step: of the phase, rising.
            numbers: floats, integers, truth values, texts, or tensors of one element.

        Raises:
            ArgumentError: if a value is none of these.
            SaveError: if it cannot be written.
        """
        record = record_of(self._phase, step, numbers)
        self._metrics.append(record)
        if self._boards is not None:
            self._boards.add(record)

    def save_checkpoint(self, name: str, state: Mapping[str, Any]) -> None:
        """Saves what a killed run needs to go on, in the place of the checkpoint of that name before it.

        Records logged so far are kept by a run that goes on; later ones are logged again by it. So one phase at a time
        saves checkpoints, each under its own name.

        Args:
            name: of the checkpoint.
            state: tensors, numbers, texts, and lists, tuples and dicts of them: what ``torch.load(weights_only=True)`` reads.

        Raises:
            ArgumentError: if the state holds anything else.
            NotFiniteError: if a tensor has NaN; the checkpoint before it is kept.
            SaveError: if it cannot be written; the checkpoint before it is kept.
        """
        write_checkpoint(self._checkpoint(name), state, self._metrics.sync(), prove=name not in self._proven)
        self._proven.add(name)
        if self._boards is not None:
            self._boards.flush()
        with self._guard:
            self._save_seconds()

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """The last state saved under that name, on the CPU, or None if there is none.

        Raises:
            ArgumentError: if the file is damaged.
        """
        path = self._checkpoint(name)
        return dict(read_checkpoint(path)["state"]) if path.exists() else None

    def path(self, name: str) -> Path:
        """A place for a file that an experiment itself keeps to go on from, such as ``curve.json``.

        Raises:
            ArgumentError: if the name is no plain file name, or ends as the run's own checkpoints do.
        """
        if name.endswith((".pt", UNFINISHED)):
            raise ArgumentError(f"file {name!r}: names that end in .pt and {UNFINISHED} are the run's own; end it otherwise")
        return self._place(name)

    def figure(self, name: str, figure: Figure) -> list[Path]:
        """Saves a figure as PNG and SVG, without dates, so that the same figure is the same file.

        Raises:
            SaveError: if it cannot be written.
        """
        make_folder(self.folder / "figures")
        paths = [self.folder / "figures" / f"{_checked(name, 'figure')}.{kind}" for kind in ("png", "svg")]
        for path in paths:
            content = io.BytesIO()
            figure.savefig(content, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
            replace_file(path, content.getbuffer())
        return paths

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Writes ``result.json``: the experiment and its settings, the result, and the seconds of each phase.

        Returns:
            What is in the file.

        Raises:
            ArgumentError: if the result has a key of the harness's own, or a value that JSON cannot hold.
            SaveError: if it cannot be written.
        """
        own = {*self._config, "seconds"}
        if taken := sorted(own & set(result)):
            raise ArgumentError(f"the result has the keys {taken}, which the run adds itself: leave them out")
        whole: dict[str, Any] = plain({**self._config, **result, "seconds": self.seconds})
        write_json(self.folder / "result.json", whole)
        return whole

    def _checkpoint(self, name: str) -> Path:
        return self._place(f"{name}.pt")

    def _place(self, name: str) -> Path:
        make_folder(self.folder / "checkpoints")
        return self.folder / "checkpoints" / _checked(name, "file")

    def _phase_seconds(self) -> float:
        assert self._phase is not None
        return self._seconds.get(self._phase, 0.0) + time.perf_counter() - self._since

    def _end_phase(self) -> None:
        with self._guard:
            self._seconds = self.seconds
            self._phase = None
            self._save_seconds()

    def _save_seconds(self) -> None:
        self._saved = time.perf_counter()
        write_json(self.folder / "seconds.json", self.seconds)


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"{what} {name!r}: a name is of letters, digits, '.', '_' and '-', since files are called after it")
    return name
