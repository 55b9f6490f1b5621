"""The commands of ``flipout``, one function each: they parse, show progress and print; the work is done elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import flipout
from flipout_experiments.commands.lm_command import lm
from flipout_experiments.commands.reproduce_command import reproduce
from flipout_experiments.commands.tune_command import tune
from flipout_experiments.commands.usage import epilog
from flipout_experiments.harness.console import interval, progress_bars, spread

if TYPE_CHECKING:
    from flipout_experiments.paper.demo import DemoResult

__all__ = ["app"]

app = typer.Typer(
    help="Per-example random weights: measurements and experiments.",
    epilog=epilog("flipout demo --quick", "flipout reproduce list", "flipout train-es --help"),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(reproduce, name="reproduce")
app.command(epilog=epilog("flipout lm --text book.txt --epochs 5", "flipout lm --text book.txt --resume --prompt Once"))(lm)
app.command(
    epilog=epilog(
        "flipout tune --model gpt2 --prompts prompts.txt --reward rewards.py:score",
        "flipout tune --model gpt2 --prompts prompts.jsonl --reward tasks:score --lora 4 --workers 8 --resume",
    )
)(tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(flipout.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command(epilog=epilog("flipout demo --quick", "flipout demo --device cuda --out runs/gpu"))
def demo(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data split, the net, and every draw.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for result.json, demo.png and demo.svg.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of a minute and a half: wide intervals.")] = False,
) -> None:
    """Show on real digits how the variance of a gradient falls with the batch: shared noise, flipout, independent noise."""
    from flipout_experiments.paper.demo import DemoSettings, run_demo, save_result  # after the options, so that --help is fast

    console = Console()
    settings = DemoSettings(seed=seed, device=device)
    console.print(
        "\n[bold]flipout demo[/bold]: gradients of a 784-512-512-10 net on MNIST digits, with noisy weights.\n"
        "  shared        all examples of a batch of N have one noise\n"
        "  flipout       that one noise, times random signs for each example\n"
        "  independent   each example has a noise of its own: exact, and N times the cost\n"
    )
    with progress_bars(console) as report:
        result = run_demo(settings.quick() if quick else settings, report)
    _print_demo(console, result)
    for path in save_result(result, out):
        console.print(f"saved {path}", highlight=False, soft_wrap=True)
    console.print(f"{sum(result.seconds.values()):.0f} s in all", highlight=False)


@app.command(epilog=epilog("flipout report runs --out report.html"))
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders of them; by default runs.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("runs/report.html"),
) -> None:
    """Write one self-contained HTML page from run folders: figures, tables beside the paper's numbers, settings, wall time."""
    from flipout_experiments.report import write_report

    finished, unfinished = write_report(runs or [Path("runs")], out)
    console = Console()
    for folder in unfinished:
        console.print(f"left out, not finished: {folder}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"saved {out}: {len(finished)} runs", highlight=False, soft_wrap=True, markup=False)


@app.command(
    "train-es", epilog=epilog("flipout train-es CartPole-v1 --goal 475", "flipout train-es Acrobot-v1 --population 128 --resume")
)
def train_es(
    env: Annotated[str, typer.Argument(help="A gymnasium id, such as CartPole-v1, Acrobot-v1, LunarLander-v3.")],
    population: Annotated[int, typer.Option(min=2, help="Policies a generation, each in an environment of its own.")] = 64,
    generations: Annotated[int, typer.Option(min=1, help="Train for at most so many.")] = 100,
    std: Annotated[float, typer.Option(help="Standard deviation of the noise, in the units of the weights.")] = 0.3,
    learning_rate: Annotated[float, typer.Option(help="Step size of Adam, in the units of the weights.")] = 0.1,
    hidden: Annotated[str, typer.Option(help="Hidden units of the policy, with commas; 0 for a linear policy.")] = "16",
    episodes: Annotated[int, typer.Option(min=1, help="Played by each policy in a generation.")] = 1,
    goal: Annotated[
        float | None,
        typer.Option(help="Stop once the population's mean return stays above it; by default the environment's own threshold."),
    ] = None,
    max_seconds: Annotated[float, typer.Option(min=0, help="Stop after so many seconds of training; 0 for no limit.")] = 0.0,
    normalize: Annotated[bool, typer.Option(help="Normalise observations by what the population has seen.")] = True,
    video: Annotated[bool, typer.Option(help="Draw an episode into episode.gif.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/train-es-ENV.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the policy, the noise and the environments.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
) -> None:
    """Train a policy for a gymnasium environment by evolution: the whole population in one batched pass a step."""
    from flipout_experiments.harness.run import Run
    from flipout_experiments.paper.evolution.train_es import TrainSettings, check_environment, layer_sizes
    from flipout_experiments.paper.evolution.train_es import train_es as train

    console = Console()
    check_environment(env)  # before a folder is made for it
    settings = TrainSettings(
        env, layer_sizes(hidden), population, std, learning_rate, generations, episodes, goal, normalize, max_seconds, seed=seed,
        device=device,
    )  # fmt: skip
    folder = Path("runs") / f"train-es-{env.replace('/', '-')}" if out is None else out
    with Run.open(folder, "train-es", settings, resume, tensorboard) as run, progress_bars(console) as progress:
        result = run.result if run.finished else run.finish(train(settings, run, progress, video))
    console.print(
        f"{env}: {result['generations']} generations; mean return of the mean policy over {settings.judged} episodes: "
        f"{result['mean_return']:.1f} ± {result['standard_error']:.1f}",
        highlight=False,
    )
    for path in sorted([folder / "result.json", *folder.glob("*.gif"), *folder.glob("figures/*")]):
        console.print(f"saved {path}", highlight=False, soft_wrap=True)


def _print_demo(console: Console, result: DemoResult) -> None:
    settings, reached = result.settings, result.pretraining
    console.print(f"\ndata: {result.source}", highlight=False)
    console.print(
        f"net: trained without noise for {reached['steps']:.0f} steps, to {100 * reached['train_accuracy']:.1f} % accuracy on its "
        f"training images ({100 * reached['test_accuracy']:.1f} % on test images), then frozen\n",
        highlight=False,
    )
    console.print(_variance_table(result))
    console.print(_ratio_table(result))
    console.print(_slope_table(result))
    console.print(_training_table(result))
    console.print(
        f"Intervals are {100 * settings.confidence:.0f} % t-intervals. Under independent noise, draws at all N are built "
        "from the same members. Accuracies are those of the mean weights.\n",
        highlight=False,
    )


def _variance_table(result: DemoResult) -> Table:
    table = Table(title="Variance of the gradient, summed over all weights (draws)", title_justify="left")
    table.add_column("N", justify="right")
    for name in result.curves:
        table.add_column(name, justify="right")
    for i, size in enumerate(result.settings.batch_sizes):
        points = [curve[i] for curve in result.curves.values()]
        table.add_row(f"{size:,}", *(f"{spread(point.total)} ({point.draws})" for point in points))
    return table


def _ratio_table(result: DemoResult) -> Table:
    table = Table(title="Relative to independent noise", title_justify="left")
    table.add_column("N", justify="right")
    table.add_column("shared / independent", justify="right")
    table.add_column("flipout / independent", justify="right")
    for i, size in enumerate(result.settings.batch_sizes):
        table.add_row(f"{size:,}", *(interval(result.ratio(name, "independent", i)) for name in ("shared", "flipout")))
    return table


def _slope_table(result: DemoResult) -> Table:
    table = Table(title="Slope on log-log axes (-1 is 1/N)", title_justify="left")
    table.add_column("estimator")
    table.add_column("slope", justify="right")
    for name in result.curves:
        table.add_row(name, interval(result.slope(name)))
    return table


def _training_table(result: DemoResult) -> Table:
    settings = result.settings
    title = f"One noisy training run each: {settings.training_steps} steps of N = {settings.training_batch}"
    table = Table(title=title, title_justify="left")
    for name in ("estimator", "mean loss (nats)", "sd over steps", "test accuracy", "seconds a step"):
        table.add_column(name, justify="left" if name == "estimator" else "right")
    for name, run in result.training.items():
        cells = f"{run.mean_loss:.3f}", f"{run.spread:.3f}", f"{100 * run.accuracy:.1f} %", f"{run.seconds / len(run.losses):.3f}"
        table.add_row(name, *cells)
    return table
