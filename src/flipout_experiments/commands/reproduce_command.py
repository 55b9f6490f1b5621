"""The commands of ``flipout reproduce``: one for each entry of the registry, and ``list``."""

from __future__ import annotations

import enum
import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flipout_experiments.commands.usage import epilog
from flipout_experiments.harness.console import progress_bars
from flipout_experiments.harness.reproduce import ENTRIES, PRESETS, Entry, Option, run_experiment

__all__ = ["add_command", "reproduce"]

reproduce = typer.Typer(
    help="The paper's figures and tables, run anew.",
    epilog=epilog("flipout reproduce list", "flipout reproduce variance --preset smoke"),
    no_args_is_help=True,
)

_PRESET = Option("preset", PRESETS, "smoke: seconds; laptop: minutes on two cores; paper: the paper's settings, for a GPU.")


@reproduce.command("list", epilog=epilog("flipout reproduce list"))
def _list() -> None:
    """List what can be run: names, what is seen, where in the paper, presets and options."""
    table = Table(title="flipout reproduce NAME", title_justify="left")
    for column in ("name", "what is seen", "of the paper", "presets", "options"):
        table.add_column(column, overflow="fold")
    for entry in ENTRIES:
        options = "\n".join(f"--{option.name} {' '.join(option.choices)}" for option in entry.options)
        table.add_row(entry.name, entry.title, entry.paper, "\n".join(PRESETS), options)
    Console().print(table)


def add_command(app: typer.Typer, entry: Entry) -> None:
    """Adds the command of an entry, with its own options and those that all have."""

    def command(**given: Any) -> None:
        _run(entry, **{name: value.value if isinstance(value, enum.Enum) else value for name, value in given.items()})

    parameters = list(_parameters(entry))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    own = "".join(f" --{option.name} {option.choices[-1]}" for option in entry.options[:1])
    examples = epilog(f"flipout reproduce {entry.name}{own} --preset smoke", f"flipout reproduce {entry.name} --resume")
    app.command(entry.name, help=f"{entry.paper[0].upper()}{entry.paper[1:]}: {entry.title}.", epilog=examples)(command)


def _run(
    entry: Entry, preset: str, data_dir: Path | None, out: Path | None, device: str, seed: int, resume: bool, tensorboard: bool,
    **options: Any,
) -> None:  # fmt: skip
    console = Console()
    experiment = entry.load()
    folder = entry.folder(preset, options) if out is None else out
    console.print(f"\n[bold]flipout reproduce {entry.name}[/bold]: {entry.title} ({entry.paper})", highlight=False)
    finished = resume and (folder / "result.json").exists()
    try:
        with progress_bars(console) as progress:
            result = run_experiment(
                entry, preset, folder, seed=seed, device=device, data_dir=data_dir, resume=resume, tensorboard=tensorboard,
                progress=progress, **options,
            )  # fmt: skip
    except KeyboardInterrupt:
        given = {**options, "preset": preset, "data-dir": data_dir, "out": folder, "device": device, "seed": seed}
        words = [word for name, value in given.items() if value is not None for word in (f"--{name.replace('_', '-')}", str(value))]
        again = shlex.join(["flipout", "reproduce", entry.name, *words, *["--tensorboard"] * tensorboard, "--resume"])
        console.print(f"stopped; to go on from the last checkpoint:\n{again}", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    if finished:
        console.print(f"{folder} holds a finished run: nothing was left to do", highlight=False, soft_wrap=True, markup=False)
    experiment.show(result, console)
    for path in sorted([folder / "result.json", *folder.glob("figures/*")]):
        console.print(f"saved {path}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"{sum(result['seconds'].values()):.0f} s in all", highlight=False)


def _parameters(entry: Entry) -> Iterator[inspect.Parameter]:
    for option in (*entry.options, _PRESET):
        kind: Any = enum.Enum(option.name, {choice: choice for choice in option.choices})  # type: ignore[misc]
        default = kind("laptop" if option is _PRESET else option.choices[0])
        yield _parameter(option.name, kind, default, option.help)
    for number in entry.numbers:
        yield _parameter(number.name, float, number.default, number.help)
    yield _parameter(
        "data_dir",
        Path | None,
        None,
        "Folder with the data sets in their official formats; by default downloaded, or the embedded ones.",
    )
    where = "-".join([entry.name, *(option.name.upper() for option in entry.options), "PRESET"])
    yield _parameter("out", Path | None, None, f"Folder of the run; by default runs/{where}.")
    yield _parameter("device", str, "cpu", "cpu, cuda, cuda:1, ...")
    yield _parameter("seed", int, 0, "Seed of the data, the net and every draw.", min=0)
    yield _parameter("resume", bool, False, "Go on with the run in that folder.", flag="--resume")
    yield _parameter("tensorboard", bool, False, "Write TensorBoard's files too.", flag="--tensorboard")


def _parameter(name: str, kind: Any, default: Any, told: str, flag: str | None = None, **more: Any) -> inspect.Parameter:
    option = typer.Option(flag or f"--{name.replace('_', '-')}", help=told, **more)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


for _entry in ENTRIES:
    add_command(reproduce, _entry)
