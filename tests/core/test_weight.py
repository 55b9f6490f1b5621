"""The carrier: its form, its parts, and the way through the compiler."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import flipout
from flipout.weight import Factor, Layout

SHAPES = {"matrix": (3, 5), "kernel": (4, 2, 3, 3), "vector": (7,), "scalar": (), "stack": (2, 3, 4)}


def carrier(shape: tuple[int, ...], estimator: str, members: int = 4) -> tuple[flipout.PerturbedWeight, flipout.Draw]:
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    net = flipout.Perturbed(module, flipout.Gaussian(0.3, relative=True), LISTED[estimator])
    with net.hold(members) as draw:
        (weight,) = draw.carriers(members, 0)
    assert isinstance(weight, flipout.PerturbedWeight)
    return weight, draw


every_form = pytest.mark.parametrize("estimator", [name for name in LISTED if name != "shared"])
every_shape = pytest.mark.parametrize("kind", SHAPES)


@every_form
@every_shape
def test_listing_members_one_by_one_or_all_at_once_is_the_same(kind: str, estimator: str) -> None:
    weight, draw = carrier(SHAPES[kind], estimator)
    dense = weight.dense()
    assert dense.shape == (4, *SHAPES[kind])
    for n in range(4):
        assert distance(dense[n], weight.member(n)) <= EXACT
        assert distance(dense[n], draw.weights(n)["w"]) <= EXACT
    assert len({tuple(row.flatten().tolist()) for row in dense}) > 1


@every_form
@every_shape
def test_it_comes_apart_and_together_again(kind: str, estimator: str) -> None:
    weight, _ = carrier(SHAPES[kind], estimator)
    assert is_traceable_wrapper_subclass(weight)
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    assert all(type(part) in (torch.Tensor, nn.Parameter) for part in parts.values())
    rebuilt = flipout.PerturbedWeight.__tensor_unflatten__(parts, context, weight.shape, weight.stride())
    assert torch.equal(rebuilt.dense(), weight.dense())
    doubled = {name: part * 2 if part.is_floating_point() else part for name, part in parts.items()}
    again = flipout.PerturbedWeight.__tensor_unflatten__(doubled, context, weight.shape, weight.stride())
    assert not torch.equal(again.dense(), weight.dense())


@every_form
def test_transposing_twice_and_slicing_keep_the_members(estimator: str) -> None:
    weight, _ = carrier((3, 5), estimator)
    dense = weight.dense()
    assert torch.equal(weight.t().t().dense(), dense)
    assert torch.equal(weight.t().dense(), dense.mT)
    assert torch.equal(weight[1:, ::2].dense(), dense[:, 1:, ::2])
    assert torch.equal(weight.view(15).dense(), dense.flatten(1))
    assert torch.equal(torch.cat([weight, weight]).dense(), torch.cat([dense, dense], 1))
    assert torch.equal(weight.unsqueeze(0).squeeze(0).dense(), dense)
    for piece, expected in zip(weight.chunk(2, 1), dense.chunk(2, 2), strict=True):
        assert torch.equal(piece.dense(), expected)


def test_a_transposed_view_keeps_its_signs_packed() -> None:
    """The signs of a sliced or regrouped weight are numbers; a transposed one keeps its bits, and its cheap rule."""
    bits = torch.zeros(4, 1, dtype=torch.uint8)
    factor = Factor(bits, (1,), (5,))
    assert factor.packed
    assert factor.count == 5
    assert torch.equal(factor.flat(torch.float64), -torch.ones(4, 5, dtype=torch.float64))
    assert factor.broadcast(2, torch.float64).shape == (4, 1, 5)
    assert factor.members(slice(1, 3)).flat(torch.float32).shape == (2, 5)


def test_its_parts_are_frozen() -> None:
    weight, _ = carrier((3, 5), "flipout")
    for part, name in ((weight.batch, "rows"), (weight.terms[0], "base"), (weight.terms[0].factors[0], "values")):
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, None)


@pytest.mark.parametrize("n", [-1, 4])
def test_a_member_outside_is_refused(n: int) -> None:
    with pytest.raises(flipout.MemberError, match="members 0 to 3"):
        carrier((3, 5), "flipout")[0].member(n)


@pytest.mark.parametrize(
    ("layout", "shape", "features", "axis"),
    [
        (Layout(4, 4, 0), (4, 7), 1, 0),
        (Layout(4, 8, 0), (8, 3, 7), 1, 0),
        (Layout(4, 4, 1), (3, 4, 7), 1, 1),
        (Layout(4, 4, 0), (12, 7), 1, 0),  # folded batch·time
        (Layout(4, 4, 1), (4, 7), 1, 0),  # a batch-second model that kept one row per example
        (Layout(4, 4, 0), (4, 3, 3), 2, 0),
    ],
)
def test_rows_are_found(layout: Layout, shape: tuple[int, ...], features: int, axis: int) -> None:
    x = torch.zeros(shape)
    found, at = layout.locate(x, features, "a test")
    assert at == axis
    assert found.shape == x.shape


def test_an_operand_that_all_examples_share_is_expanded_to_the_rows() -> None:
    found, axis = Layout(4, 8, 0).locate(torch.zeros(1, 3, 7), 1, "a test")
    assert (tuple(found.shape), axis) == ((8, 3, 7), 0)


@pytest.mark.parametrize(
    ("layout", "shape", "features"),
    [
        (Layout(4, 4, 0), (5, 7), 1),
        (Layout(4, 4, 0), (8, 3, 7), 1),
        (Layout(4, 8, 0), (4, 7), 1),
        (Layout(4, 4, 1), (12, 7), 1),
        (Layout(4, 4, 2), (5, 7), 1),
        (Layout(None, 4, 0), (4, 7), 1),
    ],
)
def test_rows_that_are_not_there_are_refused(layout: Layout, shape: tuple[int, ...], features: int) -> None:
    with pytest.raises(flipout.BatchError, match="a test"):
        layout.locate(torch.zeros(shape), features, "a test")
