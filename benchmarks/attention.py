"""What does a transformer cost with one weight per example? A GPT-2-shaped stack, a training step, against the plain stack.

    python -m benchmarks.attention [--rounds 15] [--threads 2]

Steps of the plain and the perturbed model alternate in one process; a ratio is that of neighbouring steps. The limit of the
method is 2 for the products with weights (two in place of one), less for the rest of the model, which has none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flipout


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


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def ratios(plain: nn.Module, net: nn.Module, x: Tensor, rounds: int) -> tuple[list[float], float]:
    """Perturbed over plain, one ratio a round, and the plain step's median in seconds."""

    def training_step(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

        return step

    first, second = training_step(plain), training_step(net)
    for _ in range(3):
        first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return [b / a for a, b in pairs], statistics.median(a for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    width, heads, layers, batch, length = 256, 4, 4, 8, 128
    x = torch.randn(batch, length, width)
    print(f"width {width}, {layers} layers, {batch} x {length} tokens, {arguments.threads} threads, {arguments.rounds} rounds")
    for name, make in {"GPT-2 blocks": blocks, "nn.TransformerEncoder": encoder}.items():
        for law, noise in {"additive": flipout.Gaussian(0.01), "relative": flipout.MultiplicativeGaussian(0.1)}.items():
            plain, inner = make(width, heads, layers), make(width, heads, layers)
            found, base = ratios(plain, flipout.Perturbed(inner, noise), x, arguments.rounds)
            low, middle, high = statistics.quantiles(found, n=4)
            print(f"{name:22} {law:9} {middle:5.2f} x plain (quartiles {low:.2f} to {high:.2f}); plain {1e3 * base:.0f} ms")


if __name__ == "__main__":
    main()
