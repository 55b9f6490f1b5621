"""Files of data that are cut short, changed, or of something else: an error that says which, or the right data; never others."""

import gzip
import tarfile

import numpy as np
import pytest
import torch
from formats import LINES, cifar, digits, idx, packed, put, remote_of
from loopback import serve

import flipout
from flipout import data
from flipout.data.sources import fetch
from flipout.errors import SaveError


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


def test_a_full_disk_while_an_archive_is_unpacked_leaves_nothing_that_looks_unpacked(tmp_path, monkeypatch):
    files = {"cifar-10-binary.tar.gz": packed(cifar())}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with serve({f"/{name}": content for name, content in files.items()}) as server:
        remote = remote_of("cifar-10-batches-bin", files, server.url)
        with monkeypatch.context() as patch:
            patch.setattr(tarfile.TarFile, "extractall", full)
            with pytest.raises(
                SaveError, match=r"unpacked could not be written \(No space left on device\); nothing of it was kept"
            ):
                data.cifar10(cache=tmp_path, remote=remote)
        assert [path.name for path in (tmp_path / "cifar-10-batches-bin").iterdir()] == ["cifar-10-binary.tar.gz"]
        found = data.cifar10(cache=tmp_path, remote=remote)
    assert len(server.requests) == 1
    assert len(found.train) == 12


def test_an_archive_that_is_none_is_told_and_nothing_of_it_is_kept(tmp_path):
    files = {"cifar-10-binary.tar.gz": packed(cifar())[:9000]}
    with serve({f"/{name}": content for name, content in files.items()}) as server:
        remote = remote_of("cifar-10-batches-bin", files, server.url)
        with pytest.raises(flipout.ArgumentError, match=r"tar\.gz cannot be read .*; remove it, and it is downloaded anew"):
            data.cifar10(cache=tmp_path, remote=remote)
    assert [path.name for path in (tmp_path / "cifar-10-batches-bin").iterdir()] == ["cifar-10-binary.tar.gz"]


def test_a_download_that_was_changed_since_is_downloaded_anew(tmp_path):
    whole = digits()
    with serve({f"/{name}": content for name, content in whole.items()}) as server:
        remote = remote_of("mnist", whole, server.url)
        first = data.mnist(cache=tmp_path, remote=remote)
        path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
        path.write_bytes(flipped(path.read_bytes(), 500))
        again = data.mnist(cache=tmp_path, remote=remote)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert path.read_bytes() == whole[path.name]
    assert len(server.requests) == 5


def test_a_text_that_was_cut_short_is_not_taken_for_the_known_one(tmp_path):
    files = {name: lines.encode() for name, lines in LINES.items()}
    remote = remote_of("ptb", files)
    assert "hash" not in data.penn_treebank(data_dir=put(tmp_path / "whole", files), remote=remote).source
    cut = {**files, "ptb.train.txt": files["ptb.train.txt"][:20]}
    found = data.penn_treebank(data_dir=put(tmp_path / "cut", cut), remote=remote)
    assert found.source.endswith("(ptb.train.txt: not the known file, its hash is another)")
    assert len(found.train) == 5


@pytest.mark.parametrize("fault", ["truncated", "other bytes"])
def test_a_file_with_another_hash_is_refused_and_not_kept(fault, tmp_path):
    content = LINES["ptb.train.txt"].encode()
    with serve({"/a.txt": content}) as server:
        remote = remote_of("ptb", {"a.txt": content}, server.url)
        server.faults["/a.txt"] = [fault]
        with pytest.raises(flipout.ArgumentError, match=r"a\.txt could not be downloaded .*its hash is another.*nothing was kept"):
            fetch(remote, "a.txt", tmp_path)
        assert not list((tmp_path / "ptb").iterdir())
        assert fetch(remote, "a.txt", tmp_path).read_bytes() == content  # the next try


@pytest.mark.parametrize("fault", ["broken off", "missing", "truncated"])
def test_another_server_is_tried(fault, tmp_path):
    content = b"x" * 5000
    with serve({"/a": content}) as bad, serve({"/a": content}) as good:
        bad.faults["/a"] = [fault]
        assert fetch(remote_of("d", {"a": content}, bad.url, good.url), "a", tmp_path).read_bytes() == content
        assert (len(bad.requests), len(good.requests)) == (1, 1)


def test_what_is_broken_off_is_not_kept_and_the_embedded_text_stands_in(tmp_path):
    files = {name: lines.encode() for name, lines in LINES.items()}
    with serve({f"/{name}": content for name, content in files.items()}) as server:
        remote = remote_of("ptb", files, server.url)
        server.faults["/ptb.valid.txt"] = ["broken off"]
        found = data.penn_treebank("word", cache=tmp_path, remote=remote)
        assert "pydoc topics of the standard library" in found.source
        assert "embedded, since ptb.valid.txt could not be downloaded" in found.source
        assert [path.name for path in (tmp_path / "ptb").iterdir()] == ["ptb.train.txt"]
        whole = data.penn_treebank("word", cache=tmp_path, remote=remote)  # goes on where it broke off
    assert whole.valid.tolist() == [0, 6, 3, 4]
    assert server.requests.count("/ptb.train.txt") == 1


def damaged(**changes: bytes) -> dict[str, bytes]:
    names = {"images": "train-images-idx3-ubyte.gz", "labels": "train-labels-idx1-ubyte.gz"}
    return {**digits(), **{names[key]: content for key, content in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": b"not gzip"}, "cannot be read"),
        ({"images": gzip.compress(b"\0\0\x0d\x03" + bytes(100))}, "expected an idx file of bytes"),
        ({"images": gzip.compress(b"\0\0")}, "expected an idx file of bytes"),
        ({"images": gzip.compress(idx(np.zeros((3, 28, 28)))[:-1])}, r"says that it holds \(3, 28, 28\) bytes, but has 2351"),
        ({"labels": gzip.compress(idx(np.zeros(3)))}, "do not belong together"),
        ({"labels": gzip.compress(idx(np.full(64, 11)))}, "a label is 11; expected 0 to 9"),
        ({"images": gzip.compress(idx(np.zeros((64, 28, 28))))[:40]}, "cannot be read"),
        ({"images": flipped(gzip.compress(idx(np.zeros((64, 28, 28)))), 30)}, "cannot be read"),
        ({"images": gzip.compress(b"\0\0\x08\x03" + b"\xff\xff\xff\xff" * 3)}, "bytes, but has 0"),
    ],
)
def test_damaged_idx_files(tmp_path, changes, message):
    with pytest.raises(flipout.ArgumentError, match=message):
        data.mnist(data_dir=put(tmp_path, damaged(**changes)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test_batch.bin": bytes(3073)}, r"no data_batch_1\.bin"),
        ({"test_batch.bin": bytes(3073), "data_batch_1.bin": bytes(3072)}, "not a multiple of 3,073"),
        ({"test_batch.bin": bytes(3073), "data_batch_1.bin": b""}, "not a multiple of 3,073"),
        ({"test_batch.bin": bytes([12]) + bytes(3072), "data_batch_1.bin": bytes(3073)}, "label 12"),
        ({}, r"has test_batch\.bin; check the data folder"),
    ],
)
def test_damaged_cifar_files(tmp_path, files, message):
    with pytest.raises(flipout.ArgumentError, match=message):
        data.cifar10(data_dir=put(tmp_path, files))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ptb.valid.txt": " \n"}, "is empty"), ({"ptb.test.txt": b"\xff\xfe\x00"}, "cannot be read"), (None, r"has ptb\.train\.txt")],
)
def test_damaged_texts(tmp_path, change, message):
    put(tmp_path, {} if change is None else {**LINES, **change})
    with pytest.raises(flipout.ArgumentError, match=message):
        data.penn_treebank(data_dir=tmp_path)
