"""What the loaders return: labelled examples, and text as token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flipout.errors import ArgumentError

__all__ = ["Dataset", "Examples", "Text", "text_batches"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples.

    Attributes:
        inputs: ``[n, ...]``; images are float32 in [0, 1], ``[n, channels, height, width]``.
        labels: ``[n]``, int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device."""
        return Examples(self.inputs.to(device), self.labels.to(device))

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` examples drawn with replacement: inputs and labels. The generator is one of the CPU."""
        index = torch.randint(len(self), (n,), generator=generator).to(self.labels.device)
        return self.inputs[index], self.labels[index]

    def batches(self, n: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """One epoch in random order, in batches of ``n``; a last incomplete batch is dropped."""
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        return [(self.inputs[index], self.labels[index]) for index in order.split(n) if len(index) == n]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set, and where they come from.

    Attributes:
        name: for example ``"mnist"``.
        source: which files were read, for the record of an experiment.
        train, test: the examples.
    """

    name: str
    source: str
    train: Examples
    test: Examples

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on a device."""
        return Dataset(self.name, self.source, self.train.to(device), self.test.to(device))


@dataclass(frozen=True, eq=False)
class Text:
    """A text in three splits, as token ids.

    Attributes:
        name: for example ``"penn_treebank"``.
        source: which files were read, for the record of an experiment.
        level: ``"word"`` or ``"char"``.
        vocabulary: the token of each id, in the order of their first appearance in the training split.
        splits: ``"train"``, ``"valid"`` and ``"test"``, each ``[n]``, int64.
    """

    name: str
    source: str
    level: str
    vocabulary: tuple[str, ...]
    splits: Mapping[str, Tensor]

    @property
    def train(self) -> Tensor:
        """The tokens to learn from, int64 ``[length]``."""
        return self.splits["train"]

    @property
    def valid(self) -> Tensor:
        """The tokens to choose settings by, int64 ``[length]``."""
        return self.splits["valid"]

    @property
    def test(self) -> Tensor:
        """The tokens to report on, int64 ``[length]``."""
        return self.splits["test"]

    def to(self, device: torch.device | str) -> Text:
        """The same text on a device."""
        splits = {name: tokens.to(device) for name, tokens in self.splits.items()}
        return Text(self.name, self.source, self.level, self.vocabulary, splits)

    def sample(self, n: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``n`` windows of ``steps`` tokens at random places of the training split, and the tokens that follow each of theirs.

        Returns:
            Inputs and targets, ``[n, steps]`` each. The generator is one of the CPU.

        Raises:
            ArgumentError: if the split is shorter than a window.
        """
        tokens = self.train
        if len(tokens) <= steps:
            raise ArgumentError(f"windows of {steps} tokens and one that follows were asked of a text of {len(tokens)}")
        starts = torch.randint(len(tokens) - steps, (n, 1), generator=generator).to(tokens.device)
        windows = tokens[starts + torch.arange(steps + 1, device=tokens.device)]
        return windows[:, :-1], windows[:, 1:]


def text_batches(tokens: Tensor, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Truncated backpropagation's batches: ``batch`` contiguous streams, cut into windows that follow one another.

    What fills no whole stream or window at the end is left out.

    Args:
        tokens: ``[n]``.
        batch: streams.
        steps: tokens in a window.

    Returns:
        Inputs and targets, ``[batch, steps]`` each; row b of each window goes on where row b of the one before ended.

    Raises:
        ArgumentError: if the text does not fill one window of each stream.

    Example:
        >>> [inputs.tolist() for inputs, _ in text_batches(torch.arange(11), batch=2, steps=2)]
        [[[0, 1], [5, 6]], [[2, 3], [7, 8]]]
    """
    length = len(tokens) // batch if batch > 0 else 0
    if length <= steps or steps < 1:
        raise ArgumentError(f"{len(tokens)} tokens do not fill {batch} streams with a window of {steps} and the token after it")
    streams = tokens[: batch * length].view(batch, length)
    return [(streams[:, t : t + steps], streams[:, t + 1 : t + 1 + steps]) for t in range(0, length - steps, steps)]
