"""What does a perturbed recurrent layer cost in training, against the plain layer and against bayesian-torch?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import flipout
from benchmarks import peers
from benchmarks.harness import MIN_ROUNDS, PATIENCE, Timing, forward_backward, race
from benchmarks.memory import MARGIN, saved_bytes
from benchmarks.report import Section, Target

STD = 0.05
#: (inputs, units, steps, batch, perturbed, bound on the LSTM's ratio)
SETTINGS = [
    (650, 650, 35, 20, "*", 2.3),
    (256, 256, 35, 32, "*", 2.6),
    (1000, 1000, 100, 32, "weight_hh*", 1.8),
]
PEER_SETTINGS = [(650, 650, 35, 20), (256, 256, 35, 32)]
PEER_BOUND = 5.0
GRU_MARGIN = 1.1
NOISES = {
    "fixed Gaussian": flipout.Gaussian(STD),
    "learnable Gaussian": flipout.Gaussian(STD, learnable=True),
    "DropConnect": flipout.DropConnect(0.5),
}

TEXT = """Forward and backward of one recurrent layer over a whole sequence, float32; the input requires a gradient, every
perturbed parameter gets its own, and so do the scales where these are learnable. ΔW and signs are drawn anew for each call and
held over its steps. A plain layer needs six matrix products; flipout twelve, ten with a fixed additive scale, nine (eight) where
only the recurrent weights are perturbed. bayesian-torch's LSTM draws a new ΔW at every time step, which is another model: the
race tells what it costs, not that it does the same. *saved*: bytes that autograd keeps between forward and backward at the first
setting, parameters excluded; the bound is what the plain layer keeps, one ΔW, one bit a sign, and 10 % on top."""


def layers(kind: type[nn.RNNBase], width: int, units: int, include: str) -> dict[str, nn.Module]:
    """The plain layer, and one wrapped under each noise."""
    nets: dict[str, nn.Module] = {"plain": kind(width, units)}
    for name, noise in NOISES.items():
        nets[f"flipout, {name}"] = flipout.Perturbed(kind(width, units), noise, include=include)
    return nets


def _race(kind: type[nn.RNNBase], setting: tuple[int, int, int, int, str], rounds: int, patience: float) -> dict[str, Timing]:
    width, units, steps, batch, include = setting
    torch.manual_seed(0)
    x = torch.randn(steps, batch, width, requires_grad=True)
    nets = layers(kind, width, units, include)
    if units >= 1000:  # one noise is enough where a step takes seconds
        nets = {name: nets[name] for name in ("plain", "flipout, DropConnect")}
    return race({name: forward_backward(net, x) for name, net in nets.items()}, rounds=rounds, patience=patience)


def _peer_race(setting: tuple[int, int, int, int], rounds: int, patience: float) -> dict[str, Timing]:
    width, units, steps, batch = setting
    torch.manual_seed(0)
    x = torch.randn(batch, steps, width, requires_grad=True)
    ours = flipout.Perturbed(nn.LSTM(width, units, batch_first=True), NOISES["learnable Gaussian"])
    contestants = {"flipout, learnable Gaussian": ours, "bayesian-torch LSTMFlipout": peers.lstm(width, units)}
    return race({name: forward_backward(net, x) for name, net in contestants.items()}, rounds=rounds, patience=patience)


def _saved(section: Section) -> None:
    width, units, steps, batch, include, _ = SETTINGS[0]
    for kind in (nn.LSTM, nn.GRU):
        x: Tensor = torch.randn(steps, batch, width, requires_grad=True)
        saved = {name: saved_bytes(net, x) for name, net in layers(kind, width, units, include).items()}
        plain = kind(width, units)
        weights = sum(p.numel() * p.element_size() for p in plain.parameters())
        signs = batch * sum(sum(p.shape) for p in plain.parameters())
        bound = MARGIN * (saved["plain"] + weights + signs / 8)
        for name in NOISES:
            section.targets.append(Target(f"{kind.__name__} saved, {name} / bound", saved[f"flipout, {name}"] / bound, 1.0))
        counts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in saved.items())
        section.notes.append(f"{kind.__name__} saved, MiB: {counts}; bound {bound / 2**20:.1f}.")


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races plain and perturbed LSTM and GRU at each setting, and the peer at one."""
    section = Section("recurrent", "Recurrent layers, forward + backward", TEXT)
    for *setting, bound in SETTINGS:
        width, units, steps, batch, include = setting
        name = f"{width} → {units}, T = {steps}, batch {batch}, {'all weights' if include == '*' else 'hidden to hidden'}"
        lstm, gru = (_race(kind, tuple(setting), rounds, patience) for kind in (nn.LSTM, nn.GRU))  # type: ignore[arg-type]
        for kind, timings in (("LSTM", lstm), ("GRU", gru)):
            section.add_race(f"{kind} {name}", timings)
        for contestant in lstm:
            if contestant != "plain":
                section.add_target(f"LSTM {name}, {contestant} / plain", lstm[contestant], bound)
                section.add_target(f"GRU {name}, {contestant} / plain", gru[contestant], GRU_MARGIN * lstm[contestant].ratio)
    _saved(section)
    missing = peers.why_missing()
    if missing:
        section.notes.append(missing)
    else:
        for peer_setting in PEER_SETTINGS:
            name = "LSTM {} → {}, T = {}, batch {}".format(*peer_setting)
            timings = _peer_race(peer_setting, rounds, patience)
            section.add_race(f"{name}, against the peer", timings)
            ahead = timings["bayesian-torch LSTMFlipout"].ratio
            section.targets.append(Target(f"{name}, bayesian-torch / flipout, learnable", ahead, PEER_BOUND, at_least=True))
    return section


if __name__ == "__main__":
    print(run().markdown())
