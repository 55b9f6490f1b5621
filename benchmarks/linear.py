"""What does a perturbed ``nn.Linear`` cost in training, against the plain layer and against bayesian-torch?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import flipout
from benchmarks import peers
from benchmarks.harness import MIN_ROUNDS, PATIENCE, Timing, forward_backward, race
from benchmarks.report import Section

SIZES = [(8192, 784, 512), (1024, 1024, 1024), (128, 1024, 1024)]
LEARNABLE_BOUND = {8192: 2.3, 1024: 2.3, 128: 3.2}
FIXED_BOUND = {8192: 1.95, 1024: 1.95}
PEER_BOUND = 1.2
STD = 0.05
FLOOR = "six bare products"

TEXT = """Forward and backward of one linear layer, float32; the input requires a gradient, weight and bias are both perturbed
and get theirs, and so do their scales where these are learnable. The plain layer needs three matrix products, flipout six, five
with a fixed additive scale (limits 2.0 and 1.67). The last row of each size is six products and nothing else."""


def six_products(x: Tensor, out: int) -> Callable[[], None]:
    """The matrix products of a perturbed layer and nothing else: the floor for any learnable scale."""
    x = x.detach()
    w, g = torch.randn(out, x.shape[1]), torch.randn(x.shape[0], out)

    def step() -> None:
        for _ in range(2):
            torch.mm(x, w.t())
            torch.mm(g, w)
            torch.mm(g.t(), x)

    return step


def ceiling(size: str, peer: Timing, floor: Timing) -> str:
    """How far any layer with a learnable scale could lead the peer."""
    low, middle, high = peer.over(floor)
    most = "the most by which a learnable scale could lead here"
    return f"{size}: bayesian-torch / six bare products is {middle:.2f} ({low:.2f} – {high:.2f}): {most}."


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races plain, learnable, fixed and the peer at each size."""
    section = Section("linear", "Linear layer, forward + backward", TEXT)
    missing = peers.why_missing()
    if missing:
        section.notes.append(missing)
    for rows, width, out in SIZES:
        torch.manual_seed(0)
        x = torch.randn(rows, width, requires_grad=True)
        layers = {
            "plain": nn.Linear(width, out),
            "flipout, learnable Gaussian": flipout.Perturbed(nn.Linear(width, out), flipout.Gaussian(STD, learnable=True)),
            "flipout, fixed Gaussian": flipout.Perturbed(nn.Linear(width, out), flipout.Gaussian(STD)),
        }
        if not missing:
            layers["bayesian-torch LinearFlipout"] = peers.linear(width, out)
        size = f"[{rows}, {width}] → {out}"
        each = rounds if rows > 128 else 3 * rounds
        steps = {name: forward_backward(net, x) for name, net in layers.items()}
        timings = race({**steps, FLOOR: six_products(x, out)}, rounds=each, patience=patience)
        section.add_race(size, timings)
        section.add_target(f"{size} learnable / plain", timings["flipout, learnable Gaussian"], LEARNABLE_BOUND[rows])
        if rows in FIXED_BOUND:
            section.add_target(f"{size} fixed / plain", timings["flipout, fixed Gaussian"], FIXED_BOUND[rows])
        if not missing:
            peer, own = timings["bayesian-torch LinearFlipout"], timings["flipout, learnable Gaussian"]
            section.add_lead(f"{size} bayesian-torch / learnable", peer, own, PEER_BOUND)
            section.notes.append(ceiling(size, peer, timings[FLOOR]))
    return section


if __name__ == "__main__":
    print(run().markdown())
