"""``flipout tune``: a language model towards a reward, without a gradient, in a run folder."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout, LowRank
from flipout.evolution import EvolutionStrategy, TextRewards
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.paper.evolution.evolution_plots import draw_rewards
from flipout_experiments.tuning.inputs import (
    NamedReward,
    PromptBatches,
    fingerprint,
    load_model,
    read_prompts,
    save_model,
    with_adapters,
)

__all__ = ["TuneSettings", "tune", "tune_settings"]

#: Estimators by name.
ESTIMATORS: dict[str, Estimator] = {"flipout": Flipout(), "low-rank": LowRank(1)}
#: Prompts on which the mean model is judged, at most.
_JUDGED = 256


@dataclass(frozen=True)
class TuneSettings:
    """One run of tuning; :func:`tune_settings` fills it in.

    Attributes:
        model: the folder of the checkpoint.
        prompts, valid: files of prompts, to tune on and to judge the mean model on.
        reward: ``module:function``.
        sha256: of the prompts and of what the checkpoint is, so that a run does not go on with others.
        max_new_tokens, temperature: of decoding.
        population, std, learning_rate, estimator: of the strategy and of Adam.
        generations: updates.
        batch: prompts a generation; 0 for all.
        rows: texts written at once, at most.
        include: name patterns of what is searched.
        lora, lora_targets: rank of the adapters that are searched instead of the weights, and what they adapt; rank 0 for none.
        zscore: whether rewards are compared prompt by prompt.
        judge_every, save_every: generations between two judgements of the mean model, and two checkpoints.
        workers: processes on Ray; 0 for this one.
    """

    model: Path
    prompts: Path
    valid: Path
    reward: str
    sha256: str
    max_new_tokens: int = 32
    temperature: float = 0.0
    population: int = 64
    std: float = 0.01
    learning_rate: float = 1e-3
    estimator: str = "flipout"
    generations: int = 100
    batch: int = 16
    rows: int = 512
    include: tuple[str, ...] = ("*",)
    lora: int = 0
    lora_targets: str = "all-linear"
    zscore: bool = False
    judge_every: int = 10
    save_every: int = 5
    workers: int = 0
    seed: int = 0
    device: str = "cpu"


def tune_settings(model: str, prompts: Path, reward: str, valid: Path | None = None, **options: Any) -> TuneSettings:
    """The settings, with what they name looked at.

    Raises:
        ArgumentError: for a file that is not there, an unknown estimator, numbers that mean nothing.
    """
    valid = prompts if valid is None else valid
    for texts in (prompts, valid):
        read_prompts(texts)  # raises for what cannot be read
    folder = Path(model)
    digest = fingerprint(prompts, valid, *([folder] if folder.is_dir() else []))
    place = folder.resolve() if folder.is_dir() else folder
    settings = TuneSettings(place, prompts.resolve(), valid.resolve(), reward, digest, **options)
    if settings.estimator not in ESTIMATORS:
        raise ArgumentError(f"estimator {settings.estimator!r}: choose {' or '.join(ESTIMATORS)}")
    if settings.population < 2 or settings.population % 2:
        raise ArgumentError(f"population={settings.population}: members come in pairs, so it is even and at least 2")
    return settings


def tune(
    settings: TuneSettings,
    run: Run,
    progress: Progress,
    tell: Callable[[str], None] = lambda text: None,
    folder: Path = Path(),
    download: bool = False,
) -> dict[str, Any]:
    """Tunes in a run folder, or goes on from its last checkpoint; returns the result.

    Args:
        settings, run, progress: as everywhere.
        tell: of lines for the user.
        folder: that ``module:function`` is looked for in.
        download: fetch a model that is not there.

    Raises:
        ArgumentError: for a model, prompts or a reward that do not fit.
        EvaluationError: if the reward raises.
    """
    model, tokenizer = load_model(str(settings.model), settings.device, download)
    if settings.lora:
        model = with_adapters(model, settings.lora, settings.lora_targets, settings.seed)
    options: dict[str, Any] = {}
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ArgumentError(f"{settings.model}: its tokenizer has neither a padding nor an end-of-sequence token: give it one")
        tell("the tokenizer has no padding token: its end-of-sequence token stands in, masked")
        options["pad_token_id"] = tokenizer.eos_token_id
    reward = NamedReward(settings.reward, folder)
    batches = PromptBatches(read_prompts(settings.prompts), settings.batch, settings.seed)
    options |= {"temperature": settings.temperature, "seed": settings.seed}
    rewards = TextRewards(tokenizer, reward, batches, settings.max_new_tokens, **options)
    es = _strategy(settings, model, rewards)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=settings.learning_rate)
    judged = read_prompts(settings.valid)[:_JUDGED]
    state = run.load_checkpoint("tune") or {"curve": [], "judged": [], "best": None}
    curve, points, best = list(state["curve"]), list(state["judged"]), state["best"]
    if "es" in state:
        _load(model, state["weights"])
        es.load_state_dict(state["es"])
        optimiser.load_state_dict(state["optimiser"])

    def judge() -> None:
        nonlocal best
        found = torch.cat([rewards.rewards(model, judged[i : i + settings.rows]) for i in range(0, len(judged), settings.rows)])
        points.append({"generation": len(curve), "reward": float(found.mean())})
        run.log(step=len(curve), judged_reward=points[-1]["reward"])
        if best is None or points[-1]["reward"] > best["reward"]:
            best = {**points[-1], "weights": _weights(model)}

    with run.phase("tune", progress) as report, _stepping(es, rewards, settings.workers) as step:
        if not points:
            judge()
        while len(curve) < settings.generations:
            start, rewards.tokens = time.perf_counter(), 0
            fitness = step()
            optimiser.step()
            kept = fitness[fitness.isfinite()]  # workers may have dropped some
            curve.append({"mean": float(kept.mean()), "spread": float(kept.std()), "best": float(kept.max())})
            run.log(
                step=len(curve), mean_reward=curve[-1]["mean"], reward_spread=curve[-1]["spread"], best_reward=curve[-1]["best"]
            )
            tokens = rewards.tokens / (time.perf_counter() - start)
            last = len(curve) == settings.generations
            if len(curve) % settings.judge_every == 0 or last:
                judge()
                tell(
                    f"generation {len(curve)}: reward {curve[-1]['mean']:.4g} ± {curve[-1]['spread']:.2g} of the population, "
                    f"{points[-1]['reward']:.4g} of the mean model; {tokens:,.0f} tokens/s"
                )
            if len(curve) % settings.save_every == 0 or last:
                parts = {"es": es.state_dict(), "optimiser": optimiser.state_dict(), "weights": _weights(model)}
                run.save_checkpoint("tune", {**parts, "curve": curve, "judged": points, "best": best})
            report(len(curve), settings.generations)
    assert best is not None
    with run.phase("save", progress):
        for name, weights in (("best", best["weights"]), ("mean", _weights(model))):
            whole = copy.deepcopy(model)
            _load(whole, weights)
            save_model(whole, tokenizer, run.folder / "models" / name)
    with run.phase("figure", progress):
        run.figure("rewards", draw_rewards(curve, points))
    return {
        "generations": len(curve),
        "reward_before": points[0]["reward"],
        "reward_after": points[-1]["reward"],
        "reward_best": best["reward"],
        "best_generation": best["generation"],
        "curve": curve,
        "judged": points,
    }


def _strategy(settings: TuneSettings, model: Any, rewards: TextRewards) -> EvolutionStrategy:
    prompts = len(rewards.prompts(0))
    each = max(settings.rows // prompts // 2 * 2, 2)
    return EvolutionStrategy(
        model,
        settings.std,
        settings.population,
        estimator=ESTIMATORS[settings.estimator],
        fitness_shaping=rewards.zscore if settings.zscore else "centered_rank",
        seed=settings.seed,
        chunk=min(each, settings.population),
        include=list(settings.include),
    )


@contextlib.contextmanager
def _stepping(es: EvolutionStrategy, rewards: TextRewards, workers: int) -> Iterator[Callable[[], Tensor]]:
    """What makes an update: here, or on Ray."""
    if not workers:
        yield lambda: es.step(rewards)
        return
    from flipout.evolution import RayWorkers

    with RayWorkers(es, rewards, workers) as many:
        yield many.step


def _weights(model: Any) -> dict[str, Tensor]:
    """What is trained, a copy on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _load(model: Any, weights: dict[str, Tensor]) -> None:
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes, there = ({name: tuple(value.shape) for name, value in each.items()} for each in (own, weights))
    if shapes != there:
        wrong = min(name for name in {**own, **weights} if shapes.get(name) != there.get(name))
        raise ArgumentError(
            f"the checkpoint of the run is of another model ({wrong} differs): go on with the model that it began with"
        )
    for name, parameter in own.items():
        parameter.copy_(weights[name])
