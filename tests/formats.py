"""Data sets in their official formats, small enough for tests."""

import gzip
import hashlib
import io
import tarfile
from functools import cache
from pathlib import Path

import numpy as np

from flipout import data
from flipout.data.sources import Remote

#: Penn Treebank's files.
LINES = {
    "ptb.train.txt": " the cat <unk> sat \n on the mat \n",
    "ptb.valid.txt": " the mat sat \n",
    "ptb.test.txt": " a dog \n",
}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@cache
def digits() -> dict[str, bytes]:
    """Real digits, out of the embedded ones, in the four files of MNIST."""
    found = data.embedded_mnist()
    parts = {"train": found.train, "t10k": found.test}
    files = {}
    for name, part in parts.items():
        pixels = (part.inputs[:64, 0] * 255).round().numpy()
        files[f"{name}-images-idx3-ubyte.gz"] = gzip.compress(idx(pixels))
        files[f"{name}-labels-idx1-ubyte.gz"] = gzip.compress(idx(part.labels[:64].numpy()))
    return files


@cache
def cifar() -> dict[str, bytes]:
    generator = np.random.default_rng(0)

    def rows(count: int) -> bytes:
        labels, pixels = generator.integers(10, size=(count, 1)), generator.integers(256, size=(count, 3072))
        return np.concatenate([labels, pixels], 1).astype(np.uint8).tobytes()

    return {"data_batch_1.bin": rows(7), "data_batch_2.bin": rows(5), "test_batch.bin": rows(3)}


def packed(files) -> bytes:
    """An archive of CIFAR-10's files."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return whole.getvalue()


def put(folder: Path, files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def remote_of(folder: str, files, *urls: str) -> Remote:
    return Remote(folder, urls, {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in files.items()})
