"""How does a policy learn in equal time, beside EvoTorch's PGPE? Curves over seeds, on one core; ``python -m benchmarks.rl``.

It takes the better part of an hour (two environments, three seeds, three systems), so ``python -m benchmarks`` leaves it out. It
needs ``pip install 'flipout[experiments,mujoco,box2d]' evotorch==0.6.1``. Runs are kept one by one in ``--runs``; a killed
comparison goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.__main__ import PAGE, RESULTS, ROOT, insert
from benchmarks.learners import GAMES, SYSTEMS, Game, settings_of
from benchmarks.report import Row, Section, Target, environment, version_of
from flipout.intervals import estimate_mean
from flipout.storage.files import replace_file
from flipout_experiments.harness.console import interval
from flipout_experiments.harness.plot_style import RC

#: Judgements of the mean policy along a curve; episodes of the last one.
MARKS, LAST = 12, 100
COLOURS = {"flipout": "#0072B2", "EvoTorch": "#D55E00", "EvoTorch, set as flipout": "#CC79A7"}
PACKAGES = ("gymnasium", "evotorch", "mujoco", "box2d")


def train(system: str, game: Game, seed: int) -> dict[str, Any]:
    """Trains for the game's processor seconds; judging is not counted.

    Returns:
        ``curve``: wall and processor seconds, generations, environment steps and the mean return of the mean policy, at
        :data:`MARKS` marks; ``returns`` of the last policy.
    """
    torch.manual_seed(seed)
    learner, seconds = SYSTEMS[system](game, seed), game.seconds
    spent = wall = 0.0
    generations = 0
    curve: list[dict[str, float]] = []
    while spent < seconds:
        began, start = time.perf_counter(), time.process_time()
        learner.step(max(1 - spent / seconds, 0.0))
        spent += time.process_time() - start
        wall += time.perf_counter() - began
        generations += 1
        if spent >= seconds * (len(curve) + 1) / MARKS:
            found = float(learner.returns(game.judged).mean())
            curve.append({"wall": wall, "processor": spent, "generations": generations, "steps": learner.steps, "return": found})
            print(
                f"{game.env} {system} seed {seed}: {spent:4.0f} s, {generations} generations, return {found:.0f}", file=sys.stderr
            )
    returns = learner.returns(LAST)
    return {
        "system": system, "env": game.env, "seed": seed, "settings": settings_of(system, game), "curve": curve,
        "mean": float(returns.mean()), "error": float(returns.std()) / LAST**0.5,
    }  # fmt: skip


def interpolated(runs: Sequence[Mapping[str, Any]], clock: str, grid: Any) -> Any:
    """Returns ``[runs, len(grid)]`` at seconds of a clock."""
    return np.array([np.interp(grid, [p[clock] for p in r["curve"]], [p["return"] for p in r["curve"]]) for r in runs])


def draw(runs: Sequence[Mapping[str, Any]], games: Sequence[Game]) -> Figure:
    """Mean return of the mean policy against processor seconds: a line a system, every seed faintly, the range as a band."""
    with rc_context(RC):
        figure = Figure(figsize=(4.6 * len(games), 3.6), layout="constrained")
        for axes, game in zip(np.atleast_1d(figure.subplots(1, len(games))), games, strict=True):
            for system, colour in COLOURS.items():
                own = [run for run in runs if run["env"] == game.env and run["system"] == system]
                if not own:
                    continue
                grid = np.linspace(max(r["curve"][0]["processor"] for r in own), game.seconds, 100)
                found = interpolated(own, "processor", grid)
                axes.plot(grid, found.T, color=colour, alpha=0.35, linewidth=0.8)
                axes.fill_between(grid, found.min(0), found.max(0), color=colour, alpha=0.12, linewidth=0)
                axes.plot(grid, found.mean(0), color=colour, linewidth=2, label=system)
            axes.axhline(game.target, color="0.6", linewidth=0.8, linestyle=(0, (4, 2)))
            axes.set_title(game.env)
            axes.set_xlabel("processor seconds of training, one core")
            axes.grid(color="0.92", linewidth=0.8)
        figure.axes[0].set_ylabel("return of the mean policy")
        figure.axes[0].legend(frameon=False)
        return figure


def first_above(run: Mapping[str, Any], target: float) -> float | None:
    """Processor seconds until the mean policy is first judged at the target or above."""
    return next((point["processor"] for point in run["curve"] if point["return"] >= target), None)


def summary(runs: Sequence[Mapping[str, Any]], games: Sequence[Game], where: Mapping[str, Any]) -> Section:
    """The table, the targets and the figure of runs."""
    section = Section(
        "rl", "Reinforcement learning in equal time", text_of(games, {run["system"] for run in runs}), environment=dict(where)
    )
    for game in games:
        for system in SYSTEMS:
            own = [run for run in runs if run["env"] == game.env and run["system"] == system]
            if not own:
                continue
            last = [run["curve"][-1] for run in own]
            above = [first_above(run, game.target) for run in own]
            means = [run["mean"] for run in own]
            cells = {
                "system": system,
                f"mean return, {LAST} episodes, by seed": ", ".join(f"{run['mean']:.0f} ± {run['error']:.0f}" for run in own),
                "over seeds": interval(estimate_mean(means)),
                "s to the target": ", ".join("-" if s is None else f"{s:.0f}" for s in above),
                "generations": ", ".join(f"{p['generations']}" for p in last),
                "million steps": ", ".join(f"{p['steps'] / 1e6:.2f}" for p in last),
                "wall, s": ", ".join(f"{p['wall']:.0f}" for p in last),
            }
            section.rows.append(Row(game.env, cells))
            if system == "flipout":
                what = f"{game.env}, least mean return of {len(own)} seeds"
                section.targets.append(Target(what, min(means), game.target, at_least=True))
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items() if version)
    section.notes.append(f"{packages}.")
    return section


def text_of(games: Sequence[Game], systems: Collection[str]) -> str:
    """What was run, with every setting."""
    ours = "; ".join(
        f"{g.env}, {g.seconds:g} s: {f'{g.hidden[0]} tanh units' if g.hidden else 'a linear policy'}, {g.population} members, "
        f"σ {g.std:g}, step {g.learning_rate:g}"
        for g in games
    )
    theirs = "; ".join(
        f"{g.env}: `{g.network}`, {g.popsize} solutions, `max_speed` {g.max_speed:g}, observations "
        f"{'normalised' if g.normalized else 'as they are'}"
        for g in games
    )
    third = "* *EvoTorch, set as flipout*: its PGPE with all that *flipout* has, but that σ and step do not fall.\n"
    third = third if "EvoTorch, set as flipout" in systems else ""
    return f"""Each system trains a policy for the same processor seconds on one core, judging aside.

* *flipout*: the library's strategy with Adam, centered ranks and normalised observations; σ falls to a half and the step to a
  tenth over the time. {ours}.
* *EvoTorch*: its PGPE with ClipUp on its vectorised gymnasium problem, initial radius 15 and step 0.75 times `max_speed`, with
  what its `rl_clipup.py` has for LunarLander(Continuous), and for Walker2d instead of Swimmer, which is not there. {theirs}.
{third}
The settings of *flipout* were found by trials on these environments and seeds; [results.md](results.md#reinforcement-learning)
lists what else was tried. Those of *EvoTorch* are taken as told, and were not sought.

The mean policy is judged along the way in {" and ".join(f"{g.judged}" for g in games)} episodes, at the end in {LAST}.

![Return against processor seconds: mean, range and every seed](figures/rl.png)"""


def versions() -> dict[str, Any]:
    """The machine, and the packages that environments and peers come from."""
    return {**environment(), "threads": 1, "packages": {name: version_of(name) for name in PACKAGES}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl", description=__doc__)
    parser.add_argument("--faster", type=float, default=1.0, help="divides the time given to every run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--envs", nargs="*", default=[game.env for game in GAMES])
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "rl", help="where each run is kept")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    games = [replace(game, seconds=game.seconds / chosen.faster) for game in GAMES if game.env in chosen.envs]
    chosen.runs.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(chosen.seeds):
        for game in games:
            for system in chosen.systems:
                path = chosen.runs / f"{game.env}-{system.replace(', ', '-').replace(' ', '-')}-{seed}.json"
                if not path.exists():
                    found = {**train(system, game, seed), "environment": versions()}
                    replace_file(path, json.dumps(found, indent=1).encode())
                run = json.loads(path.read_text(encoding="utf-8"))
                if run["settings"] != settings_of(system, game):
                    sys.exit(f"{path} was run with other settings; move it away to run it anew")
                runs.append(run)
    section = summary(runs, games, runs[0]["environment"])
    draw(runs, games).savefig(ROOT / "docs" / "figures" / "rl.png", dpi=150)
    written = json.dumps({**section.json(), "runs": runs}, indent=1, ensure_ascii=False)
    (RESULTS / "rl.json").write_text(written + "\n", encoding="utf-8")
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(section.markdown())


if __name__ == "__main__":
    main()
