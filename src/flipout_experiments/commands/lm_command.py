"""The command ``flipout lm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flipout_experiments.harness.console import progress_bars

__all__ = ["lm"]


def lm(
    text: Annotated[Path, typer.Option(help="A text in UTF-8.")],
    level: Annotated[str, typer.Option(help="Tokens: char or word.")] = "char",
    method: Annotated[
        str | None, typer.Option(help="none, gal, gaussian-flipout, wd-flipout, ...; by default with flipout.")
    ] = None,
    units: Annotated[int, typer.Option(min=1, help="Units of each LSTM layer.")] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text, at most.")] = 20,
    learning_rate: Annotated[float | None, typer.Option(help="Step size; by default 0.008 by characters, 20 by words.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/lm-TEXT.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the model and every draw.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder, or use the model in it.")] = False,
    sample: Annotated[int, typer.Option(min=0, help="Tokens to draw from the model.")] = 400,
    prompt: Annotated[str, typer.Option(help="What the drawn text begins with.")] = "",
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Below 1 likely tokens come more often; 0: always the likeliest.")
    ] = 1.0,
    evaluate: Annotated[
        Path | None, typer.Option(help="Another text in UTF-8, to tell how well the model predicts it; by default none.")
    ] = None,
) -> None:
    """Train a language model with random weights on a text of your own, see how well it predicts, and let it write."""
    from flipout_experiments.language.lm import lm_settings, run_lm
    from flipout_experiments.language.tokens import read_text

    console = Console()
    if evaluate is not None:
        read_text(evaluate)  # before minutes of training
    settings = lm_settings(text, level, method, units, epochs, seed, device, learning_rate)
    folder = Path("runs") / f"lm-{text.stem}" if out is None else out
    console.print(f"\n[bold]flipout lm[/bold]: {settings.method}, {level} by {level}", highlight=False)
    try:
        with progress_bars(console) as progress:
            model = run_lm(settings, folder, resume, progress)
    except KeyboardInterrupt:
        console.print("stopped; to go on from the last checkpoint, give the same command with --resume", highlight=False)
        raise typer.Exit(130) from None
    found = model.result
    console.print(f"data: {found['data']}", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{found['unit']}: {found['train']:.4g} in training, under noise; {found['valid']:.4g} to validate, {found['test']:.4g} to "
        f"test, by the mean weights of epoch {found['best_epoch']} of {found['epochs']}; to test, the frequencies of the {level}s "
        f"alone give {found['test_by_frequency']:.4g}",
        highlight=False,
    )
    if evaluate is not None:
        for name, value in model.evaluate(evaluate).items():
            console.print(f"{evaluate}: {name} {value:,}", highlight=False, soft_wrap=True, markup=False)
    if sample:
        if unknown := model.unknown(prompt):
            told = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            console.print(f"the prompt has what the text has not: {told}", highlight=False, soft_wrap=True, markup=False)
        console.print(f"the model writes {sample:,} {level}s at temperature {temperature:g}:", highlight=False)
        console.print(f"\n{model.sample(sample, prompt, temperature, seed)}\n", highlight=False, soft_wrap=True, markup=False)
    console.print(f"saved {folder / 'result.json'}", highlight=False, soft_wrap=True, markup=False)
