"""Weight drop for an LSTM, with masks of its own for every sequence: ``python examples/lstm_weight_drop.py``.

Merity et al. (2018) drop hidden-to-hidden weights with one mask for the whole mini-batch. Under flipout each sequence has its own,
held over its time steps, at less than twice the price. The text is the documentation that Python ships.
"""

import argparse
import time

import torch
from torch import nn

import flipout
from flipout.data import penn_treebank, text_batches


class CharLSTM(nn.Module):
    """One-hot characters, an LSTM layer, and the logits of the next character."""

    def __init__(self, vocabulary: int, units: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(vocabulary, units, batch_first=True)
        self.decoder = nn.Linear(units, vocabulary)

    def forward(self, tokens, state=None):  # [N, T] to [N, T, vocabulary]
        hidden, state = self.lstm(nn.functional.one_hot(tokens, self.decoder.out_features).float(), state)
        return self.decoder(hidden), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--data-dir", help="a folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt")
    options = parser.parse_args()
    text = penn_treebank("char", data_dir=options.data_dir, download=False)
    print(text.source)
    batches = text_batches(text.train, batch=32, steps=50)
    valid_inputs, valid_targets = text_batches(text.valid, batch=8, steps=100)[0]
    for name, estimator in (("shared mask", flipout.Shared()), ("a mask a sequence", flipout.Flipout())):
        torch.manual_seed(0)
        model = CharLSTM(len(text.vocabulary), options.units)
        net = flipout.Perturbed(
            model, flipout.DropConnect(0.5), estimator, include="lstm.weight_hh*", generator=torch.Generator().manual_seed(1)
        )
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        began, state = time.perf_counter(), None
        for step in range(options.steps):
            inputs, targets = batches[step % len(batches)]
            logits, state = net(inputs, state)
            state = tuple(part.detach() for part in state)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
        net.eval()  # the mean weights
        with torch.no_grad():
            logits, _ = net(valid_inputs)
            nats = nn.functional.cross_entropy(logits.flatten(0, 1), valid_targets.flatten())
        bits, seconds = float(nats) / 0.6931471805599453, time.perf_counter() - began
        print(f"{name:18} training {float(loss.detach()):.3f} nats, validation {bits:.3f} bits per character, {seconds:.1f} s")


if __name__ == "__main__":
    main()
