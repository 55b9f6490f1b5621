"""What learns in the race of policies: the library's strategy, and EvoTorch's PGPE under two settings."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flipout.evolution import EvolutionStrategy, Rollouts
from flipout_experiments.paper.evolution.train_es import make_policy

__all__ = ["GAMES", "SYSTEMS", "Game", "settings_of"]


@dataclass(frozen=True)
class Game:
    """An environment, and how each system is set for it.

    Attributes:
        env: a gymnasium id.
        target: the mean return to reach.
        seconds: processor seconds of training.
        judged: episodes of a judgement along the curve.
        hidden, population, std, learning_rate, episodes: of the library's policy and strategy; step and σ fall with the time
            that is left, to a tenth and to a half.
        network, popsize, max_speed, normalized: EvoTorch's, after its own scripts.
    """

    env: str
    target: float
    seconds: float
    judged: int
    hidden: tuple[int, ...]
    population: int
    std: float
    learning_rate: float
    episodes: int
    network: str
    popsize: int
    max_speed: float
    normalized: bool


GAMES = (
    Game("LunarLander-v3", 200.0, 150.0, 20, (), 128, 0.5, 0.2, 1, "Linear(obs_length, act_length, False)", 200, 0.3, False),
    Game("Swimmer-v5", 200.0, 100.0, 5, (), 16, 0.5, 0.2, 1, "Linear(obs_length, act_length)", 100, 0.015, True),
)


class Library:
    """The library's strategy with Adam, centered ranks and antithetic pairs."""

    def __init__(self, game: Game, seed: int) -> None:
        self._rollouts = Rollouts(game.env, episodes=game.episodes, normalize=True)
        self._judge = Rollouts(game.env, normalize=True)  # with environments of its own, so that training keeps those it has
        self._judge.normalizer = self._rollouts.normalizer
        self._policy = make_policy(self._rollouts, game.hidden, seed)
        self._left = 1.0
        self._es = EvolutionStrategy(
            self._policy, lambda _: game.std * (1 + self._left) / 2, game.population, seed=seed, chunk=game.population
        )
        self._optimiser = torch.optim.Adam(self._policy.parameters(), lr=game.learning_rate)
        self._rate = game.learning_rate

    def step(self, left: float) -> None:
        """One generation; ``left`` is the share of the time that is left."""
        self._left = left
        self._optimiser.param_groups[0]["lr"] = self._rate * (0.1 + 0.9 * left)
        self._es.step(self._rollouts)
        self._optimiser.step()

    @property
    def steps(self) -> int:
        """Steps of the environments so far."""
        return self._rollouts.steps

    def returns(self, episodes: int) -> Tensor:
        """Returns of the mean policy."""
        self._rollouts.begin(self._es.generation)
        return self._judge.returns(self._policy, episodes)


class EvoTorch:
    """EvoTorch's PGPE on its vectorised gymnasium problem.

    Args:
        game, seed: of the run.
        ours: whether it has the library's population, σ, Adam and policy, instead of what examples/scripts/rl_clipup.py has.
    """

    def __init__(self, game: Game, seed: int, ours: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from evotorch.algorithms import PGPE
            from evotorch.neuroevolution import VecGymNE

        speed, options = game.max_speed, {"stdev_learning_rate": 0.1}
        network, size = game.network, game.popsize
        if ours:
            network = " >> Tanh() >> ".join(_layers(game.hidden))
            size = game.population
            options |= {"stdev_init": game.std, "center_learning_rate": game.learning_rate, "optimizer": "adam"}
        else:
            options |= {"radius_init": 15 * speed, "center_learning_rate": 0.75 * speed, "optimizer": "clipup"}
            options["optimizer_config"] = {"max_speed": speed, "momentum": 0.9}
        self._problem = VecGymNE(f"gym::{game.env}", network, observation_normalization=ours or game.normalized, num_actors=0)
        self._search = PGPE(self._problem, popsize=size, **options)
        self._judge = Rollouts(game.env, action=None if game.env.startswith("Lunar") else _clipped)

    def step(self, left: float) -> None:
        self._search.step()

    @property
    def steps(self) -> int:
        return int(self._problem.status.get("total_interaction_count", 0))

    def returns(self, episodes: int) -> Tensor:
        policy = self._problem.to_policy(self._search.status["center"]).float()  # its normalisation is in double precision
        return self._judge.returns(policy, episodes)


def _layers(hidden: tuple[int, ...]) -> list[str]:
    sizes = ["obs_length", *map(str, hidden), "act_length"]
    return [f"Linear({inputs}, {outputs})" for inputs, outputs in itertools.pairwise(sizes)]


def _clipped(output: Tensor) -> Any:
    return output.clamp(-1, 1).numpy()


def settings_of(system: str, game: Game) -> dict[str, Any]:
    """What of a game's settings a system's training depends on."""
    theirs, ours = ("network", "popsize", "max_speed", "normalized"), ("hidden", "population", "std", "learning_rate", "episodes")
    others = ours if system == "EvoTorch" else theirs
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(game).items() if name not in others}


SYSTEMS: Mapping[str, Callable[[Game, int], Any]] = {
    "flipout": Library,
    "EvoTorch": EvoTorch,
    "EvoTorch, set as flipout": partial(EvoTorch, ours=True),
}
