"""A GRU of one's own under the paper's methods, a row each: ``python examples/regularized_gru.py``.

``Regularized`` puts a method on any module with recurrent layers of torch; the module itself stays as it is. The text is the
standard library's own documentation, so nothing is downloaded.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import flipout
from flipout.data import penn_treebank, text_batches
from flipout.regularize import Dropout, Method, Regularized, Zoneout

METHODS = {
    "none": Method(),
    "variational dropout": Method(inputs=Dropout(0.2), outputs=Dropout(0.2), hidden=Dropout(0.2)),
    "zoneout": Method(zoneout=Zoneout(hidden=0.1)),
    "weight drop, one mask a batch": Method(noise=flipout.DropConnect(0.5), estimator=flipout.Shared()),
    "weight drop, a mask a sequence": Method(noise=flipout.DropConnect(0.5), estimator=flipout.Flipout()),
}


class Model(nn.Module):
    def __init__(self, vocabulary: int, units: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, units)
        self.gru = nn.GRU(units, units, batch_first=True)
        self.decoder = nn.Linear(units, vocabulary)

    def forward(self, tokens: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, state = self.gru(self.embedding(tokens), state)
        return self.decoder(hidden), state


def train(net: Regularized, batches: list, epochs: int) -> None:
    optimiser = torch.optim.Adam(net.module.parameters(), lr=5e-3, amsgrad=True)
    for _ in range(epochs):
        state = None  # carried from window to window, without its gradient
        for tokens, targets in batches:
            logits, state = net(tokens, state)  # masks and weights of its own for each window of each sequence
            state = state.detach()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.module.parameters(), 1.0)
            optimiser.step()


@torch.no_grad()
def bits_per_character(net: Regularized, tokens: torch.Tensor) -> float:
    logits, _ = net.eval()(tokens[None, :-1])  # the mean weights
    return float(F.cross_entropy(logits[0], tokens[1:])) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--characters", type=int, default=50_000)
    parser.add_argument("--units", type=int, default=128)
    chosen = parser.parse_args()
    text = penn_treebank("char", download=False)
    batches = text_batches(text.train[: chosen.characters], batch=16, steps=40)
    for name, method in METHODS.items():
        torch.manual_seed(0)  # the same initial weights for all
        net = Regularized(Model(len(text.vocabulary), chosen.units), method)
        train(net, batches, chosen.epochs)
        print(f"{name:<31} {bits_per_character(net, text.valid[:10_000]):.3f} bits per character", flush=True)


if __name__ == "__main__":
    main()
