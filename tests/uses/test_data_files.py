"""Official formats: read from a folder, or downloaded over a loopback HTTP server, checked, kept, and never half a file."""

import gzip
import hashlib
import pickle
import socket
from pathlib import Path

import formats
import numpy as np
import pytest
import torch
from formats import LINES, packed, put, remote_of
from loopback import serve

import flipout
from flipout import data
from flipout.data import images, text
from flipout.data.sources import Remote

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data sets in {REAL}")


@pytest.fixture
def digits():
    return formats.digits()


@pytest.fixture
def cifar():
    return formats.cifar()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("below", ["", "mnist"])
def test_mnist_from_a_folder(digits, tmp_path, compressed, below):
    files = digits if compressed else {name[:-3]: gzip.decompress(content) for name, content in digits.items()}
    put(tmp_path / below, files)
    found, embedded = data.mnist(data_dir=tmp_path), data.embedded_mnist()
    assert torch.equal(found.train.inputs, embedded.train.inputs[:64])
    assert torch.equal(found.test.labels, embedded.test.labels[:64])
    assert found.source == f"mnist, 64 training and 64 test images; {tmp_path}"


def test_cifar_from_a_folder_says_how_much_there_is(cifar, tmp_path):
    found = data.cifar10(data_dir=put(tmp_path, cifar))
    assert found.train.inputs.shape == (12, 3, 32, 32)
    assert "12 training and 3 test images" in found.source
    row = np.frombuffer(cifar["data_batch_2.bin"], np.uint8).reshape(-1, 3073)[4]
    assert found.train.labels[11] == row[0]
    assert torch.equal((found.train.inputs[11, 1, 2] * 255).round(), torch.tensor(row[1 + 1024 + 64 : 1 + 1024 + 96]).float())


def test_words_and_characters_of_penn_treebank(tmp_path):
    put(tmp_path / "ptb", LINES)
    words = data.penn_treebank("word", data_dir=tmp_path)
    assert words.vocabulary == ("the", "cat", "<unk>", "sat", "<eos>", "on", "mat", "a", "dog")
    assert words.train.tolist() == [0, 1, 2, 3, 4, 5, 0, 6, 4]
    assert words.test.tolist() == [7, 8, 4]  # what training lacks is numbered last
    symbols = data.penn_treebank("char", data_dir=tmp_path)
    assert "".join(symbols.vocabulary[i] for i in symbols.valid.tolist()) == "the_mat_sat<eos>"


def test_text_windows_and_streams():
    tokens = torch.arange(100)
    whole = data.Text("t", "", "word", tuple(map(str, range(100))), {"train": tokens, "valid": tokens, "test": tokens})
    inputs, targets = whole.sample(500, 7, torch.Generator().manual_seed(0))
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)
    assert {0, 92} <= set(inputs[:, 0].tolist()) <= set(range(93))  # the last window ends with the last token as its target
    windows = data.text_batches(tokens, 3, 8)
    assert torch.equal(torch.cat([w for w, _ in windows], 1), tokens[:99].view(3, 33)[:, :32])
    for refused in (lambda: whole.sample(1, 100, torch.Generator()), lambda: data.text_batches(tokens, 0, 8)):
        with pytest.raises(flipout.ArgumentError, match="100"):
            refused()


@real_data
def test_the_real_files():
    assert len(data.mnist(data_dir=REAL).train) == 60_000
    assert data.cifar10(data_dir=REAL).train.inputs.shape[1:] == (3, 32, 32)
    words, symbols = (data.penn_treebank(level, data_dir=REAL) for level in text.LEVELS)
    assert [len(words.splits[s]) for s in ("train", "valid", "test")] == [929_589, 73_760, 82_430]
    assert [len(symbols.splits[s]) for s in ("train", "valid", "test")] == [5_017_482, 393_042, 442_423]
    assert len(words.vocabulary) == 10_000
    shakespeare = data.tiny_shakespeare(data_dir=REAL)
    assert sum(map(len, shakespeare.splits.values())) == 1_115_394
    assert len(shakespeare.vocabulary) == 65


@real_data
@pytest.mark.parametrize("remote", [text.PENN_TREEBANK, text.TINY_SHAKESPEARE])
def test_the_known_hashes_of_texts_are_those_of_the_real_files(remote):
    for name, known in remote.hashes.items():
        kind, _, value = known.partition(":")
        assert hashlib.new(kind, (REAL / remote.folder / name).read_bytes()).hexdigest() == value


@real_data
def test_a_real_text_over_http(tmp_path):
    files = {f"/{name}": (REAL / "ptb" / name).read_bytes() for name in text.PENN_TREEBANK.hashes}
    with serve(files) as server:
        known = Remote("ptb", (server.url,), text.PENN_TREEBANK.hashes)
        found = data.penn_treebank("word", cache=tmp_path, remote=known)
    assert len(found.train) == 929_589
    assert f"downloaded from {server.url}" in found.source


def test_a_download_is_checked_kept_and_used_again(digits, tmp_path):
    with serve({f"/{name}": content for name, content in digits.items()}) as server:
        remote = remote_of("mnist", digits, server.url)
        first = data.mnist(cache=tmp_path, remote=remote)
        asked = len(server.requests)
        again = data.mnist(cache=tmp_path, remote=remote)
        assert (asked, len(server.requests)) == (4, 4)
    offline = data.mnist(cache=tmp_path, remote=remote)
    for found in (again, offline):
        assert torch.equal(found.train.inputs, first.train.inputs)
    assert "downloaded from http://127.0.0.1" in first.source
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(digits)


def test_fashion_mnist_is_mnists_format(digits, tmp_path):
    found = data.fashion_mnist(data_dir=put(tmp_path / "fashion-mnist", digits))
    assert found.name == "fashion-mnist"
    assert len(found.test) == 64


def test_an_archive_is_unpacked_once_and_whole(cifar, tmp_path):
    files = {"cifar-10-binary.tar.gz": packed(cifar)}
    with serve({f"/{name}": content for name, content in files.items()}) as server:
        remote = remote_of("cifar-10-batches-bin", files, server.url)
        found = [data.cifar10(cache=tmp_path, remote=remote) for _ in range(2)]
    assert len(server.requests) == 1
    assert torch.equal(found[0].train.inputs, found[1].train.inputs)
    assert len(found[0].train) == 12


def no_server() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_without_a_network_the_embedded_set_or_a_word_where_to_look(digits, tmp_path):
    remote = remote_of("mnist", digits, no_server())
    assert "embedded, since train-images-idx3-ubyte.gz could not be downloaded" in data.mnist(cache=tmp_path, remote=remote).source
    with pytest.raises(flipout.ArgumentError, match=r"no package ships it; name a folder that has it with --data-dir"):
        data.fashion_mnist(cache=tmp_path, remote=remote)
    with pytest.raises(flipout.ArgumentError, match="CIFAR-10: downloads are off, and no package ships it"):
        data.cifar10(download=False)


def test_shakespeare_is_parted_and_has_a_stand_in(tmp_path):
    found = data.tiny_shakespeare(data_dir=put(tmp_path, {"input.txt": "ab" * 100}))
    assert [len(found.splits[s]) for s in ("train", "valid", "test")] == [180, 10, 10]
    assert "pydoc" in data.tiny_shakespeare(download=False).source


def test_an_unknown_level():
    with pytest.raises(flipout.ArgumentError, match="level 'byte': choose 'word' or 'char'"):
        data.penn_treebank("byte", download=False)


def test_no_pickle_is_loaded(digits, cifar, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    put(tmp_path, {**digits, **cifar, **LINES})
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert data.mnist(data_dir=tmp_path)
    assert data.cifar10(data_dir=tmp_path)
    assert data.penn_treebank(data_dir=tmp_path)


def test_a_pickled_batch_is_not_taken_for_the_binary_version(cifar, tmp_path):
    put(tmp_path, {"test_batch": pickle.dumps({"data": 1}), "data_batch_1": pickle.dumps({"data": 1})})
    with pytest.raises(flipout.ArgumentError, match=r"test_batch\.bin"):
        data.cifar10(data_dir=tmp_path)


def test_remotes_name_every_file():
    for remote in (images.MNIST, images.FASHION_MNIST):
        assert len(remote.hashes) == 4
    assert all(url.startswith("http") for remote in (images.MNIST, images.CIFAR10, text.PENN_TREEBANK) for url in remote.urls)
