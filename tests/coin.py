"""An experiment for the tests of the harness: tosses coins, in two phases."""

from dataclasses import dataclass
from pathlib import Path

import torch

from flipout_experiments.harness.reproduce import Entry, Experiment, Option, choose

ENTRY = Entry("coin", "heads are half", "Figure 0", "coin", (Option("coin", ("fair", "bent"), "Which coin."),))


@dataclass(frozen=True)
class CoinSettings:
    tosses: int
    coin: str = "fair"
    seed: int = 0
    device: str = "cpu"
    data_dir: Path | None = None

    @classmethod
    def preset(cls, name, **options):
        return cls(choose(name, {"smoke": 20, "laptop": 60, "paper": 10_000}, "preset"), **options)


def run_coin(settings, run, progress):
    generator = torch.Generator().manual_seed(settings.seed)
    found = {}
    for phase, chance in (("first", 0.5), ("second", 0.5 if settings.coin == "fair" else 0.9)):
        with run.phase(phase, progress) as report:
            state = run.load_checkpoint(phase) or {"done": 0, "heads": torch.zeros(2), "generator": generator.get_state()}
            generator.set_state(state["generator"])
            for done in range(state["done"] + 1, settings.tosses + 1):
                state["heads"][int(torch.rand((), generator=generator) < chance)] += 1
                run.log(step=done, heads=state["heads"][1], share=float(state["heads"][1]) / done)
                if done % 3 == 0 or done == settings.tosses:
                    run.save_checkpoint(phase, {**state, "done": done, "generator": generator.get_state()})
                report(done, settings.tosses)
        found[phase] = state["heads"]
    return found


def show_coin(result, console):
    console.print(f"heads: {result['first'][1]:.0f}, then {result['second'][1]:.0f}")


EXPERIMENT = Experiment(CoinSettings.preset, run_coin, show_coin)
