"""What does a transformer cost with one weight per example? A GPT-2-shaped stack, a training step, against the plain stack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipout
from benchmarks.harness import MIN_ROUNDS, PATIENCE, race
from benchmarks.report import Section

WIDTH, HEADS, LAYERS, BATCH, LENGTH = 256, 4, 4, 8, 128
STD, BOUND = 0.01, 2.3

TEXT = f"""A training step (forward, backward, SGD) of {LAYERS} layers of width {WIDTH} on {BATCH} × {LENGTH} tokens, float32, every
parameter perturbed, one weight per example. Products with weights double (the limit is 2, 1.67 with a fixed scale); attention,
normalisation and GELU have none. The second stack is torch's own and attends through the attention rule."""


class Block(nn.Module):
    """A pre-norm transformer block as GPT-2's: fused projections, causal attention, a fourfold GELU layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def blocks(width: int, heads: int, layers: int) -> nn.Module:
    """A stack of :class:`Block`."""
    return nn.Sequential(*(Block(width, heads) for _ in range(layers)))


def encoder(width: int, heads: int, layers: int) -> nn.Module:
    """The same stack made of torch's own layers, which attend through the attention rule."""
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward, backward and an optimiser's step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def run(rounds: int = MIN_ROUNDS, patience: float = PATIENCE) -> Section:
    """Races the plain stack against two noises, for GPT-2's blocks and for torch's own layers."""
    section = Section("attention", "Transformer, training step", TEXT)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    for kind, make in {"GPT-2 blocks": blocks, "`nn.TransformerEncoder`": encoder}.items():
        torch.manual_seed(0)
        models = {
            "plain": make(WIDTH, HEADS, LAYERS),
            "flipout, fixed Gaussian": flipout.Perturbed(make(WIDTH, HEADS, LAYERS), flipout.Gaussian(STD)),
            "flipout, relative Gaussian": flipout.Perturbed(make(WIDTH, HEADS, LAYERS), flipout.MultiplicativeGaussian(STD)),
        }
        timings = race({name: training_step(model, x) for name, model in models.items()}, rounds=rounds, patience=patience)
        section.add_race(kind, timings)
        for name in list(models)[1:]:
            section.add_target(f"{kind}, {name.removeprefix('flipout, ')} / plain", timings[name], BOUND)
    return section


if __name__ == "__main__":
    print(run().markdown())
