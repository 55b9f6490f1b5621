"""Official formats: read from a folder, or downloaded over a loopback HTTP server, checked, kept, and never half a file."""

import gzip
import hashlib
import io
import pickle
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import serve

import flipout
from flipout import data
from flipout.data import images, text
from flipout.data.sources import Remote, fetch

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real data sets in {REAL}")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def cifar() -> dict[str, bytes]:
    generator = np.random.default_rng(0)

    def rows(count: int) -> bytes:
        labels, pixels = generator.integers(10, size=(count, 1)), generator.integers(256, size=(count, 3072))
        return np.concatenate([labels, pixels], 1).astype(np.uint8).tobytes()

    return {"data_batch_1.bin": rows(7), "data_batch_2.bin": rows(5), "test_batch.bin": rows(3)}


LINES = {
    "ptb.train.txt": " the cat <unk> sat \n on the mat \n",
    "ptb.valid.txt": " the mat sat \n",
    "ptb.test.txt": " a dog \n",
}


def put(folder: Path, files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def remote_of(folder: str, files, *urls: str) -> Remote:
    return Remote(folder, urls, {name: f"md5:{hashlib.md5(content).hexdigest()}" for name, content in files.items()})


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


def test_an_archive_is_unpacked_once_and_whole(cifar, tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as file:
        for name, content in cifar.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    files = {"cifar-10-binary.tar.gz": packed.getvalue()}
    with serve({f"/{name}": content for name, content in files.items()}) as server:
        remote = remote_of("cifar-10-batches-bin", files, server.url)
        with monkeypatch.context() as patch:  # a full disk while unpacking leaves nothing that looks unpacked
            patch.setattr(tarfile.TarFile, "extractall", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                data.cifar10(cache=tmp_path, remote=remote)
        assert [path.name for path in (tmp_path / "cifar-10-batches-bin").iterdir()] == ["cifar-10-binary.tar.gz"]
        found = [data.cifar10(cache=tmp_path, remote=remote) for _ in range(2)]
    assert len(server.requests) == 1
    assert torch.equal(found[0].train.inputs, found[1].train.inputs)
    assert len(found[0].train) == 12


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


def damaged(digits, **changes: bytes) -> dict[str, bytes]:
    names = {"images": "train-images-idx3-ubyte.gz", "labels": "train-labels-idx1-ubyte.gz"}
    return {**digits, **{names[key]: content for key, content in changes.items()}}


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
    ],
)
def test_damaged_idx_files(digits, tmp_path, changes, message):
    with pytest.raises(flipout.ArgumentError, match=message):
        data.mnist(data_dir=put(tmp_path, damaged(digits, **changes)))


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
