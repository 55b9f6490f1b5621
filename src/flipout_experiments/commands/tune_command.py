"""The command ``flipout tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flipout_experiments.harness.console import progress_bars

__all__ = ["tune"]


def tune(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint in Hugging Face's form.")],
    prompts: Annotated[Path, typer.Option(help="Prompts: a line each, or .jsonl with an object with prompt a line.")],
    reward: Annotated[str, typer.Option(help="module:function or file.py:function, (prompts, texts) -> numbers.")],
    valid: Annotated[Path | None, typer.Option(help="Prompts to judge the mean model on; by default the same.")] = None,
    generations: Annotated[int, typer.Option(min=1, help="Updates.")] = 100,
    population: Annotated[int, typer.Option(min=2, help="Models a generation, in antithetic pairs.")] = 64,
    std: Annotated[float, typer.Option(help="Standard deviation of the noise, in the units of the weights.")] = 0.01,
    learning_rate: Annotated[float, typer.Option(help="Step size of Adam, in the units of the weights.")] = 1e-3,
    estimator: Annotated[str, typer.Option(help="flipout or low-rank.")] = "flipout",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text, at most.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    batch: Annotated[int, typer.Option(min=0, help="Prompts a generation, drawn anew for each; 0 for all.")] = 16,
    rows: Annotated[int, typer.Option(min=2, help="Texts written at once, for memory.")] = 512,
    include: Annotated[str, typer.Option(help="Name patterns of what is searched, with commas.")] = "*",
    lora: Annotated[int, typer.Option(min=0, help="Search LoRA adapters of this rank; 0 for the weights themselves.")] = 0,
    lora_targets: Annotated[str, typer.Option(help="Parts that get adapters, with commas.")] = "all-linear",
    zscore: Annotated[bool, typer.Option("--zscore", help="Compare rewards prompt by prompt, by their z-scores.")] = False,
    judge_every: Annotated[int, typer.Option(min=1, help="Generations between two judgements of the mean model.")] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Processes on Ray; 0 for this one.")] = 0,
    download: Annotated[bool, typer.Option("--download", help="Fetch a model that is not there from the hub.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/tune-MODEL.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the batches and the texts.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files too.")] = False,
) -> None:
    """Tune a language model towards a reward of what it writes, without a gradient."""
    import importlib.util

    from flipout.errors import ArgumentError
    from flipout_experiments.harness.run import Run
    from flipout_experiments.tuning.inputs import NamedReward
    from flipout_experiments.tuning.tune import tune as train
    from flipout_experiments.tuning.tune import tune_settings

    for package, extra, needed in (("transformers", "loops", True), ("ray", "ray", workers > 0)):
        if needed and importlib.util.find_spec(package) is None:
            raise ArgumentError(f"tune needs {package}, which is not installed: pip install 'flipout[{extra}]'")
    console = Console()
    NamedReward(reward, Path())  # before a folder is made for it
    settings = tune_settings(
        model, prompts, reward, valid, generations=generations, population=population, std=std, learning_rate=learning_rate,
        estimator=estimator, max_new_tokens=max_new_tokens, temperature=temperature, batch=batch, rows=rows,
        include=tuple(pattern.strip() for pattern in include.split(",")), lora=lora, lora_targets=lora_targets, zscore=zscore,
        judge_every=judge_every, workers=workers, seed=seed, device=device,
    )  # fmt: skip
    folder = Path("runs") / f"tune-{Path(model).name}" if out is None else out
    with Run.open(folder, "tune", settings, resume, tensorboard) as run, progress_bars(console) as progress:

        def tell(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True, markup=False)

        result = run.result if run.finished else run.finish(train(settings, run, progress, tell, Path(), download))
    console.print(
        f"{model}: reward {result['reward_before']:.4g} before, {result['reward_after']:.4g} after {result['generations']} "
        f"generations; best {result['reward_best']:.4g}, after {result['best_generation']}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    for path in sorted([folder / "result.json", *folder.glob("models/*"), *folder.glob("figures/*")]):
        console.print(f"saved {path}", highlight=False, soft_wrap=True, markup=False)
