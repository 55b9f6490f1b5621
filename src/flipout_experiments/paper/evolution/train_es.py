"""``flipout train-es ENV``: a policy for a gymnasium environment by evolution, in a run folder."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from flipout.errors import ArgumentError
from flipout.evolution import EvolutionStrategy
from flipout.storage.files import replace_file
from flipout.streams import stream
from flipout_experiments.harness.run import Progress, Run
from flipout_experiments.nets.networks import linear
from flipout_experiments.paper.evolution.evolution_plots import draw_returns

if TYPE_CHECKING:
    from flipout.evolution.rollouts import Rollouts

__all__ = ["TrainSettings", "check_environment", "layer_sizes", "make_policy", "save_video", "threshold", "train_es"]

_WEIGHTS = 30


@dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Attributes:
        env: a gymnasium id.
        hidden: units of each hidden layer of the policy, tanh between them; empty for a linear policy.
        population, std, learning_rate: of the strategy and of Adam.
        generations: at most so many.
        episodes: that each member plays in a generation.
        goal: ends training once the mean return of the population was above it for three generations in a row; None takes the
            environment's own threshold, where it has one (inf never ends).
        normalize: of observations.
        max_seconds: ends training after so much time in the training phase; 0 never does. Such a run depends on the machine.
        judged: episodes of the mean policy at the end.
        save_every: generations between two checkpoints.
    """

    env: str
    hidden: tuple[int, ...] = (16,)
    population: int = 64
    std: float = 0.3
    learning_rate: float = 0.1
    generations: int = 100
    episodes: int = 1
    goal: float | None = None
    normalize: bool = True
    max_seconds: float = 0.0
    judged: int = 100
    save_every: int = 5
    seed: int = 0
    device: str = "cpu"


def layer_sizes(hidden: str) -> tuple[int, ...]:
    """Hidden units out of a text with commas.

    Raises:
        ArgumentError: if it holds anything else.

    Example:
        >>> layer_sizes("64,32"), layer_sizes("0")
        ((64, 32), ())
    """
    try:
        sizes = tuple(int(word) for word in hidden.split(","))
    except ValueError as error:
        raise ArgumentError(f"hidden {hidden!r}: expected whole numbers with commas, such as 64,32, or 0") from error
    if sizes == (0,):
        return ()
    if min(sizes) < 1:
        raise ArgumentError(f"hidden {hidden!r}: a layer has at least one unit")
    return sizes


def check_environment(env: str) -> None:
    """Raises ArgumentError if gymnasium is not installed or does not know the environment."""
    if importlib.util.find_spec("gymnasium") is None:
        raise ArgumentError("train-es needs gymnasium, which is not installed: pip install 'flipout[rl]'")
    from flipout.evolution.environments import make_env

    make_env(env)


def threshold(env: str) -> float | None:
    """The mean return at which an environment counts as solved, if it says one."""
    import gymnasium as gym

    spec = gym.spec(env) if isinstance(env, str) else None
    return None if spec is None else spec.reward_threshold


def make_policy(rollouts: Rollouts, hidden: tuple[int, ...], seed: int) -> nn.Module:
    """A tanh network from observations to what the actions of the environment are read from."""
    import gymnasium as gym

    space = rollouts.action_space
    outputs = int(space.n) if isinstance(space, gym.spaces.Discrete) else int(np.prod(space.shape or ()))
    generator = stream(seed, _WEIGHTS)
    sizes = (int(np.prod(rollouts.shape)), *hidden, outputs)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, units in itertools.pairwise(sizes):
        layers += [linear(inputs, units, generator), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train_es(settings: TrainSettings, run: Run, progress: Progress, video: bool = True) -> dict[str, Any]:
    """Trains in a run folder, or goes on from its last checkpoint; returns the result.

    Raises:
        ArgumentError: if gymnasium is not installed or does not know the environment.
        EvaluationError: if the environment raises.
    """
    check_environment(settings.env)
    from flipout.evolution.rollouts import Rollouts

    rollouts = Rollouts(settings.env, episodes=settings.episodes, normalize=settings.normalize)
    policy = make_policy(rollouts, settings.hidden, settings.seed).to(settings.device)
    es = EvolutionStrategy(policy, settings.std, settings.population, seed=settings.seed, chunk=settings.population)
    optimiser = torch.optim.Adam(policy.parameters(), lr=settings.learning_rate)
    parts: dict[str, Any] = {"policy": policy, "es": es, "optimiser": optimiser, "rollouts": rollouts}
    state = run.load_checkpoint("train") or {"curve": [], "above": 0, "seconds": 0.0}
    for name, part in parts.items():
        if name in state:
            part.load_state_dict(state[name])
    goal = threshold(settings.env) if settings.goal is None else settings.goal
    curve, above, spent = list(state["curve"]), int(state["above"]), float(state["seconds"])
    start = time.perf_counter()
    with run.phase("train", progress) as report:
        while len(curve) < settings.generations and above < 3:
            fitness = es.step(rollouts)
            optimiser.step()
            point = {"mean": float(fitness.mean()), "best": float(fitness.max()), "generation": len(curve)}
            curve.append(point)
            run.log(step=len(curve), mean_return=point["mean"], best_return=point["best"], environment_steps=rollouts.steps)
            above = above + 1 if goal is not None and point["mean"] > goal else 0
            seconds = spent + time.perf_counter() - start
            late = 0 < settings.max_seconds < seconds
            if len(curve) % settings.save_every == 0 or len(curve) == settings.generations or above == 3 or late:
                saved = {name: part.state_dict() for name, part in parts.items()}
                run.save_checkpoint("train", {**saved, "curve": curve, "above": above, "seconds": seconds})
            report(len(curve), settings.generations)
            if late:
                break
    with run.phase("judge", progress):
        rollouts.begin(es.generation)
        returns = rollouts.returns(policy, settings.judged)
    with run.phase("figure", progress):
        run.figure("returns", draw_returns(curve, settings.env))
        if video:
            save_video(run.folder / "episode.gif", settings.env, policy, rollouts, settings.seed)
    error = float(returns.std()) / len(returns) ** 0.5 if len(returns) > 1 else float("nan")
    return {"generations": len(curve), "mean_return": float(returns.mean()), "standard_error": error, "curve": curve}


@contextmanager
def without_screen() -> Iterator[None]:
    """Has SDL, which draws the classic environments, look for neither a screen nor loudspeakers inside."""
    before = {name: os.environ.get(name) for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER")}
    try:
        for name in before:
            os.environ.setdefault(name, "dummy")
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@torch.no_grad()
def save_video(path: Path, env: str, policy: nn.Module, rollouts: Rollouts, seed: int, max_frames: int = 500) -> None:
    """One episode of the mean policy as an animated GIF, every second frame of it, half as large.

    Raises:
        ArgumentError: if the environment cannot be drawn (its renderer is not installed).
    """
    import gymnasium as gym
    from PIL import Image

    frames: list[Image.Image] = []
    with without_screen():
        try:
            world = gym.make(env, render_mode="rgb_array", disable_env_checker=True)
        except gym.error.Error as error:
            raise ArgumentError(f"{env} cannot be drawn: {error}; pass --no-video") from error
        try:
            observation, _ = world.reset(seed=seed)
            over, step = False, 0
            while not over and len(frames) < max_frames:
                if step % 2 == 0:
                    picture: Any = world.render()
                    frames.append(Image.fromarray(picture).resize((picture.shape[1] // 2, picture.shape[0] // 2)))
                observation, _, terminated, truncated, _ = world.step(rollouts.act(policy, np.asarray(observation)[None])[0])
                over, step = bool(terminated or truncated), step + 1
        finally:
            world.close()
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0)
    replace_file(path, content.getbuffer())
