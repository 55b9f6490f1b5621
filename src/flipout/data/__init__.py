"""Data sets for experiments, in their official formats. Every loader says which source it used.

A loader reads from ``data_dir`` if it is given one; else from the cache, into which it downloads what is not there yet, each file
checked against its known hash; else, where the network cannot be had, what a pip package or the standard library ships. Pickled
files are never read.
"""

from __future__ import annotations

from flipout.data.embedded import embedded_mnist
from flipout.data.examples import Dataset, Examples, Text, text_batches
from flipout.data.images import cifar10, fashion_mnist, mnist
from flipout.data.sources import Remote
from flipout.data.text import penn_treebank, tiny_shakespeare

__all__ = [
    "Dataset",
    "Examples",
    "Remote",
    "Text",
    "cifar10",
    "embedded_mnist",
    "fashion_mnist",
    "mnist",
    "penn_treebank",
    "text_batches",
    "tiny_shakespeare",
]
