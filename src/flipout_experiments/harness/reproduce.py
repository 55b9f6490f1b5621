"""The experiments that ``flipout reproduce`` knows, and what runs one of them in a run folder.

An experiment is a module and a line in :data:`ENTRIES`. The line is all that ``flipout reproduce list`` and ``--help`` read, so
they are quick, and work where the module cannot be imported. The module has the rest, as ``EXPERIMENT``::

    # src/flipout_experiments/paper/coin.py
    @dataclass(frozen=True)
    class CoinSettings:
        tosses: int
        coin: str = "fair"
        seed: int = 0
        device: str = "cpu"
        data_dir: Path | None = None

        @classmethod
        def preset(cls, name: str, **options: Any) -> CoinSettings:  # coin, seed, device, data_dir
            tosses = choose(name, {"smoke": 10, "laptop": 1_000, "paper": 1_000_000}, "preset")
            return cls(tosses, **options)

    def run_coin(settings: CoinSettings, run: Run, progress: Progress) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(settings.seed)
        with run.phase("toss", progress) as report:
            state = run.load_checkpoint("toss") or {"done": 0, "heads": 0, "generator": generator.get_state()}
            generator.set_state(state["generator"])
            for done in range(state["done"] + 1, settings.tosses + 1):
                state["heads"] += int(torch.rand((), generator=generator) < 0.5)
                if done % 100 == 0 or done == settings.tosses:
                    run.log(step=done, heads=state["heads"])
                    run.save_checkpoint("toss", {**state, "done": done, "generator": generator.get_state()})
                report(done, settings.tosses)
        run.figure("toss", draw_coin(state["heads"]))
        return {"heads": state["heads"]}

    def show_coin(result: dict[str, Any], console: Console) -> None:
        console.print(f"{result['heads']} heads")

    EXPERIMENT = Experiment(CoinSettings.preset, run_coin, show_coin)

and the line is::

    Entry(
        "coin", "heads are half", "Figure 0", "flipout_experiments.paper.coin",
        (Option("coin", ("fair", "bent"), "Which coin."),),
    ),

which gives ``flipout reproduce coin --coin bent --preset laptop``, in the folder ``runs/coin-bent-laptop`` unless ``--out`` names
another. What :class:`~flipout_experiments.harness.run.Run` asks of a ``run`` function, so that a killed run goes on to the same
result, is told there. A result is what :func:`~flipout.storage.files.plain` can turn into JSON; ``show`` gets it as it is in
the file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flipout.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from flipout_experiments.harness.claims import Claim
    from flipout_experiments.harness.run import Progress, Run

__all__ = ["ENTRIES", "PRESETS", "Entry", "Experiment", "Number", "Option", "choose", "find_entry", "run_experiment"]

#: ``smoke`` takes seconds, ``laptop`` minutes on two cores, ``paper`` has the paper's full settings and wants a GPU.
PRESETS = ("smoke", "laptop", "paper")

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """An option of one experiment: a choice of names.

    Attributes:
        name: on the command line ``--name``, and an argument of the settings.
        choices: the first is the default.
        help: what it decides.
    """

    name: str
    choices: tuple[str, ...]
    help: str


@dataclass(frozen=True)
class Number:
    """An option of one experiment that takes a number.

    Attributes:
        name: an argument of the settings, and on the command line ``--name`` with dashes.
        default: its value where it is not given.
        help: what it decides.
    """

    name: str
    default: float
    help: str


@dataclass(frozen=True)
class Experiment:
    """What an experiment's module offers.

    Attributes:
        settings: called with the name of a preset and, by keyword, ``seed``, ``device``, ``data_dir`` and the entry's own
            options; returns a frozen dataclass of every setting.
        run: called with the settings, an open :class:`~flipout_experiments.harness.run.Run` and a progress display;
            returns the result.
        show: prints what ``result.json`` holds.
        claims: the paper's statements beside what ``result.json`` holds, for the report.
    """

    settings: Callable[..., Any]
    run: Callable[[Any, Run, Progress], Mapping[str, Any]]
    show: Callable[[dict[str, Any], Console], None]
    claims: Callable[[dict[str, Any]], Sequence[Claim]] = lambda result: ()


@dataclass(frozen=True)
class Entry:
    """A line of the registry.

    Attributes:
        name: on the command line.
        title: what is seen, in a few words.
        paper: the figure, table or section.
        module: where ``EXPERIMENT`` is, imported when it runs.
        options: its own.
        numbers: its own that are no choices; the name of the run's folder leaves them out.
    """

    name: str
    title: str
    paper: str
    module: str
    options: tuple[Option, ...] = ()
    numbers: tuple[Number, ...] = ()

    def load(self) -> Experiment:
        """Imports the experiment.

        Raises:
            ArgumentError: if this installation does not have it.
        """
        try:
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name != self.module:
                raise
            raise ArgumentError(
                f"experiment {self.name!r}: this installation has no module {self.module}; install it anew"
            ) from error
        experiment: Experiment = module.EXPERIMENT
        return experiment

    def folder(self, preset: str, options: Mapping[str, str]) -> Path:
        """Where it runs by default.

        Example:
            >>> find_entry("variance").folder("smoke", {"net": "fc"}).as_posix()
            'runs/variance-fc-smoke'
        """
        return Path("runs") / "-".join([self.name, *(options[option.name] for option in self.options), preset])


_NET = Option("net", ("fc", "convle", "convgg", "lstm"), "The paper's network.")

_METHODS = ("none", "zaremba", "semeniuta", "gal", "zoneout", "gaussian", "gaussian-flipout", "wd", "wd-flipout")

#: In the order of the paper.
ENTRIES = (
    Entry(
        "variance", "variance of a gradient against N: flipout falls as 1/N, shared noise levels off", "Figure 1",
        "flipout_experiments.paper.variance.measured_curves", (_NET,),
    ),
    Entry(
        "components", "alpha, beta and gamma of a net, and the curves they predict", "Theorem 2, Eq. 7-12",
        "flipout_experiments.paper.variance.predicted_curves", (_NET,),
    ),
    Entry(
        "regularization", "language models under masks and weight noise", "Tables 2 and 3",
        "flipout_experiments.paper.regularization",
        (
            Option("level", ("char", "word", "transformer"), "The paper's LSTMs of characters or words, or a GPT-2 of characters."),
            Option("method", ("all", *_METHODS), "One method of the level's table, or all of them."),
        ),
    ),
    Entry(
        "large-batch", "iterations and seconds to a training loss at batches of 8192, under each estimator", "Figures 2a, 4 and 7",
        "flipout_experiments.paper.race.large_batch", (
            Option("net", ("fc", "convle", "lstm"), "The paper's network."),
            Option("noise", ("auto", "bbb", "multiplicative", "dropconnect"), "auto: dropconnect for the lstm, else bbb."),
        ),
    ),
    Entry(
        "uncertainty", "calibration, and strange inputs told from digits: six ways to be unsure", "beside Sec. 4.3",
        "flipout_experiments.paper.uncertainty",
    ),
    Entry(
        "evolution", "FlipES against independent perturbations, backpropagation, and 40 cores", "Figures 2(b), 2(c), 2(d), 5",
        "flipout_experiments.paper.evolution.contest", (Option("figure", ("2b", "2c", "2d", "5"), "Which figure."),),
        (
            Number("price_gpu", 0.0, "Of Figure 5: dollars per hour of the device that runs FlipES; 0 leaves costs out."),
            Number("price_cpu", 0.0, "Of Figure 5: dollars per hour of 40 cores; 0 leaves costs out."),
        ),
    ),
)  # fmt: skip


def find_entry(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ArgumentError: if there is none; lists those there are.
    """
    return choose(name, {entry.name: entry for entry in ENTRIES}, "experiment")


def choose(name: str, among: Mapping[str, T], what: str) -> T:
    """The value of that name.

    Args:
        name: what was asked for.
        among: names and values.
        what: what they are, for the error.

    Raises:
        ArgumentError: if there is none; lists the names.

    Example:
        >>> choose("smoke", {"smoke": 10, "laptop": 200}, "preset")
        10
    """
    if name not in among:
        raise ArgumentError(f"{what} {name!r} is unknown: choose {', '.join(among)}")
    return among[name]


def run_experiment(
    entry: Entry,
    preset: str,
    folder: Path | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    data_dir: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs an experiment in a run folder, or goes on with one; a finished one is not run again.

    Args:
        entry: of the experiment.
        preset: one of :data:`PRESETS`.
        folder: of the run; by default :meth:`Entry.folder`.
        seed, device, data_dir: for the experiment's settings.
        resume, tensorboard: as in :meth:`flipout_experiments.harness.run.Run.open`.
        progress: shows how far it is.
        options: the experiment's own; by default the first choice of each, and each number's default.

    Returns:
        What is in ``result.json``.

    Raises:
        ArgumentError: if an option, the preset, the data or the folder will not do.
        SaveError: if something cannot be written; what was saved before is kept.
    """
    from flipout_experiments.harness.run import Run, silent

    choose(preset, {name: name for name in PRESETS}, "preset")
    numbers = {number.name: float(options.pop(number.name, number.default)) for number in entry.numbers}
    known = {option.name: option for option in entry.options}
    for name, value in options.items():
        choose(value, {c: c for c in choose(name, known, f"{entry.name}: option").choices}, name)
    options = {option.name: options.get(option.name, option.choices[0]) for option in entry.options}
    if data_dir is not None and not data_dir.is_dir():
        raise ArgumentError(f"--data-dir {data_dir}: no such folder; name one that holds the data, or leave it out")
    experiment = entry.load()
    data_dir = None if data_dir is None else data_dir.resolve()  # the record must not depend on where the command was given
    settings = experiment.settings(preset, seed=seed, device=device, data_dir=data_dir, **options, **numbers)
    folder = entry.folder(preset, options) if folder is None else folder
    with Run.open(folder, entry.name, settings, resume, tensorboard, preset) as run:
        return run.result if run.finished else run.finish(experiment.run(settings, run, silent if progress is None else progress))
