"""Shapes drawn by Hypothesis: the rules of linear maps, convolutions, lookups and the algebra of views against the oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases.base import Given
from hypothesis import assume, given
from hypothesis import strategies as st
from laws import EXACT, LISTED, distance, oracle
from torch import Tensor, nn
from torch.nn import functional as F

import flipout

size = st.integers(1, 9)
members = st.integers(1, 4)
blocks = st.integers(1, 3)
estimators = st.sampled_from(["flipout", "independent", "low_rank"])


def check(module: nn.Module, inputs: tuple[Tensor, ...], n: int, estimator: str, batch_dim: int = 0) -> None:
    """Values and gradients of the module equal those of its members, one by one."""
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    noise = flipout.Gaussian(0.5, learnable=True)
    net = flipout.Perturbed(module, noise, LISTED[estimator], batch_dim=batch_dim, generator=torch.Generator().manual_seed(0))
    wanted = [*net.parameters(), *(x.requires_grad_() for x in inputs if x.is_floating_point())]
    with net.hold(n) as draw:
        y, expected = net(*inputs), oracle(net, draw, inputs)
        assert distance(y, expected) <= EXACT * max(1.0, expected.abs().max().item())
        ours, theirs = (torch.autograd.grad(v.square().sum(), wanted, allow_unused=True) for v in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@given(
    n=members, k=blocks, inside=size, outside=size, lead=st.lists(st.integers(1, 3), max_size=2), bias=st.booleans(),
    batch_dim=st.integers(0, 2), estimator=estimators,
)  # fmt: skip
def test_linear(n: int, k: int, inside: int, outside: int, lead: list[int], bias: bool, batch_dim: int, estimator: str) -> None:
    batch_dim = min(batch_dim, len(lead))
    shape = [*lead[:batch_dim], n * k, *lead[batch_dim:], inside]
    check(nn.Linear(inside, outside, bias=bias), (floats(*shape),), n, estimator, batch_dim)


@given(n=members, k=blocks, inside=size, outside=size, columns=size, left=st.booleans(), estimator=estimators)
def test_matmul(n: int, k: int, inside: int, outside: int, columns: int, left: bool, estimator: str) -> None:
    if left:
        check(Given(lambda m, x: m.w @ x, w=(outside, inside)), (floats(n * k, inside, columns),), n, estimator)
    else:
        check(Given(lambda m, x: x @ m.w, w=(inside, outside)), (floats(n * k, columns, inside),), n, estimator)


@st.composite
def convolutions(draw: Any) -> dict[str, Any]:
    """A convolution that torch accepts, of any rank, plain or transposed."""
    rank = draw(st.integers(1, 3))
    per_axis = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    groups = draw(st.integers(1, 3))
    kernel, stride, dilation = draw(per_axis), draw(per_axis), draw(per_axis)
    transposed = draw(st.booleans())
    padding = [draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": tuple(kernel),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "padding": tuple(padding),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, limit)) for limit in limits)
    extents = [d * (k - 1) + 1 + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True)]
    return {"rank": rank, "transposed": transposed, "options": options, "extents": extents}


@given(geometry=convolutions(), n=st.integers(1, 3), k=st.integers(1, 2), estimator=estimators)
def test_convolutions(geometry: dict[str, Any], n: int, k: int, estimator: str) -> None:
    kinds = {
        False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    }
    module = kinds[geometry["transposed"]][geometry["rank"] - 1](**geometry["options"])
    x = floats(n * k, geometry["options"]["in_channels"], *geometry["extents"])
    try:
        module.double()(x)
    except RuntimeError:
        assume(False)
    check(module, (x,), n, estimator)


@given(n=members, k=blocks, rows=size, width=size, lead=st.lists(st.integers(1, 3), max_size=2), estimator=estimators)
def test_embeddings(n: int, k: int, rows: int, width: int, lead: list[int], estimator: str) -> None:
    indices = torch.randint(rows, (n * k, *lead), generator=torch.Generator().manual_seed(2))
    check(nn.Embedding(rows, width), (indices,), n, estimator)


# --- the algebra of views ---------------------------------------------------------------------------------------------


@st.composite
def regrouped(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with one number of entries."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=4))

    def grouping() -> tuple[int, ...]:
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=2)))
        pieces = [factors[a:b] for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
        return tuple(math.prod(piece) for piece in pieces)

    return grouping(), grouping()


def _last_linear(transform: Any) -> Any:
    """The transformed weight, whatever its shape, as the matrix of a linear map."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = transform(m.w)
        matrix = w.reshape(-1, w.shape[-1]) if w.dim() > 1 else w.reshape(1, -1)
        return F.linear(x[..., : matrix.shape[1]], matrix)

    return forward


@given(shapes=regrouped(), n=members, estimator=estimators)
def test_reshape(shapes: tuple[tuple[int, ...], tuple[int, ...]], n: int, estimator: str) -> None:
    old, new = shapes
    check(Given(_last_linear(lambda w: w.reshape(new)), w=old), (floats(n, 81),), n, estimator)


@given(shape=st.lists(st.integers(1, 3), min_size=1, max_size=4), n=members, seed=st.integers(0, 5), estimator=estimators)
def test_permute_and_back(shape: list[int], n: int, seed: int, estimator: str) -> None:
    order = torch.randperm(len(shape), generator=torch.Generator().manual_seed(seed)).tolist()
    check(Given(_last_linear(lambda w: w.permute(order)), w=tuple(shape)), (floats(n, 81),), n, estimator)
    check(Given(_last_linear(lambda w: w.permute(order).flatten().view(w.numel())), w=tuple(shape)), (floats(n, 81),), n, estimator)


@given(
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=3), n=members, estimator=estimators,
    start=st.integers(0, 1), step=st.integers(1, 2), axis=st.integers(-1, 2),
)  # fmt: skip
def test_slices(shape: list[int], n: int, estimator: str, start: int, step: int, axis: int) -> None:
    axis = min(axis, len(shape) - 1)
    index = [slice(None)] * len(shape)
    index[axis] = slice(start, None, step)
    check(Given(_last_linear(lambda w: w[tuple(index)]), w=tuple(shape)), (floats(n, 81),), n, estimator)
    check(Given(_last_linear(lambda w: w.narrow(axis, start, 1)), w=tuple(shape)), (floats(n, 81),), n, estimator)
    check(Given(_last_linear(lambda w: w.unbind(axis)[start]), w=(*shape, 2)), (floats(n, 81),), n, estimator)


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3), other=st.integers(1, 3), n=members,
    axis=st.integers(0, 2), estimator=estimators,
)  # fmt: skip
def test_cat(shape: list[int], other: int, n: int, axis: int, estimator: str) -> None:
    axis = min(axis, len(shape) - 1)
    second = list(shape)
    second[axis] = other
    joined = _last_linear(lambda w: w)

    def forward(m: Any, x: Tensor) -> Tensor:
        class Both:
            w = torch.cat([m.w, m.v], axis)

        return joined(Both, x)

    check(Given(forward, w=tuple(shape), v=tuple(second)), (floats(n, 81),), n, estimator)


@given(
    width=size, n=st.integers(2, 4), k=blocks, estimator=estimators, lead=st.lists(st.integers(1, 3), max_size=2),
    operation=st.sampled_from([torch.add, torch.sub, torch.mul, torch.div]), weight_first=st.booleans(),
)  # fmt: skip
def test_vectors_align_with_the_last_axis(
    width: int, n: int, k: int, estimator: str, lead: list[int], operation: Any, weight_first: bool
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return operation(m.w, x + 9.0) if weight_first else operation(x, 9.0 + m.w)

    check(Given(forward, w=(width,)), (floats(n * k, *lead, width).clamp(-3, 3),), n, estimator)
