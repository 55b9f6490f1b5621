"""Functions of weights: some keep their products under every estimator, others are computed once per member."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from cases.base import Case, floats, given

W = {"w": (3, 5)}
NORM_HELD = {"second derivatives": "torch's own of weight_norm is wrong: it takes the norm for a constant in it"}
SQUARE = {"w": (5, 5)}
MASK = torch.arange(15).reshape(3, 5) % 2 == 0


def _linear(name: str, function: Callable[[Any], Tensor], **shapes: tuple[int, ...]) -> Case:
    """A matrix made of weights, in a linear map."""
    return Case(name, given(lambda m, x: F.linear(x, function(m)), **shapes), floats(4, 5), affine=False)


def _times(name: str, function: Callable[[Any], Tensor], **shapes: tuple[int, ...]) -> Case:
    """A number, a vector or a row made of weights, times the data."""
    return Case(name, given(lambda m, x: x * function(m), **shapes), floats(4, 5), affine=False)


def _spd(w: Tensor) -> Tensor:
    return w @ w.mT + torch.eye(5, dtype=w.dtype)


def _parametrized(normed: Callable[..., nn.Module], layer: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.nn.utils.weight_norm is the older of two
            return normed(layer(), **options)

    return build


def _normed(name: str, layer: Callable[[], nn.Module], *shape: int, exclude: tuple[str, ...] = (), **options: Any) -> Case:
    """A layer under weight_norm, of which torch's second derivative is wrong: it takes the norm for a constant in it."""
    return Case(name, _parametrized(NORMED, layer, **options), floats(*shape), exclude=exclude, affine=False, exempt=NORM_HELD)


def _einsum(name: str, equation: str, own: tuple[int, ...], *shape: int, first: bool = False) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.einsum(equation, m.w, x) if first else torch.einsum(equation, x, m.w)

    return Case(name, given(forward, w=own), floats(*shape))


NORMED, OLD_NORMED = parametrizations.weight_norm, nn.utils.weight_norm
SPECTRAL, OLD_SPECTRAL = parametrizations.spectral_norm, nn.utils.spectral_norm

#: Closed forms, exact under every estimator without the loop.
CLOSED = [
    _normed("weight_norm", lambda: nn.Linear(5, 3), 5),
    _normed("weight_norm_3d", lambda: nn.Linear(5, 3), 4, 5),
    _normed("weight_norm_columns", lambda: nn.Linear(5, 3), 4, 5, dim=1),
    _normed("weight_norm_whole", lambda: nn.Linear(5, 3), 4, 5, dim=None),
    _normed("weight_norm_conv", lambda: nn.Conv2d(2, 4, 3), 2, 5, 5),
    _normed("weight_norm_groups", lambda: nn.Conv1d(4, 4, 3, groups=2), 4, 5),
    _normed("weight_norm_transposed", lambda: nn.ConvTranspose1d(2, 4, 3), 2, 5, dim=1),
    _normed("weight_norm_direction_alone", lambda: nn.Linear(5, 3), 5, exclude=("*original0", "bias")),
    _normed("weight_norm_gain_alone", lambda: nn.Linear(5, 3), 5, exclude=("*original1", "bias")),
    Case("weight_norm_old", _parametrized(OLD_NORMED, lambda: nn.Linear(5, 3)), floats(5), affine=False, exempt=NORM_HELD),
    Case("spectral_norm", _parametrized(SPECTRAL, lambda: nn.Linear(5, 3)), floats(4, 5), affine=False),
    Case("spectral_norm_conv", _parametrized(SPECTRAL, lambda: nn.Conv1d(2, 4, 3)), floats(2, 5), affine=False),
    Case("spectral_norm_old", _parametrized(OLD_SPECTRAL, lambda: nn.Linear(5, 3)), floats(4, 5), affine=False),
    _times("divided_by_a_number", lambda m: m.w / (4 + m.v), w=(5,), v=()),
    _linear("matrix_times_a_number", lambda m: m.v * m.w, w=(3, 5), v=(1,)),
    Case("bilinear_scaled", given(lambda m, x: F.bilinear(x, x, m.w * m.v), w=(2, 5, 5), v=()), floats(4, 5), affine=False),
    Case("conv_scaled", given(lambda m, x: F.conv1d(x, m.w / m.v.exp()), w=(2, 5, 2), v=(1,)), floats(5, 4), affine=False),
    Case(
        "lookup_scaled",
        given(lambda m, x: F.embedding(x.argsort(-1), m.w * m.v) * x[..., None], w=(5, 2), v=()),
        floats(5),
        affine=False,
    ),
    _einsum("einsum_linear", "ni,oi->no", (3, 5), 5),
    _einsum("einsum_implicit", "ni,io", (5, 3), 5),
    _einsum("einsum_weight_first", "oi,ni->no", (3, 5), 5, first=True),
    _einsum("einsum_ellipsis", "...i,oi->...o", (3, 5), 4, 5),
    _einsum("einsum_heads", "nti,ihd->nhtd", (5, 2, 3), 4, 5),
    _einsum("einsum_of_heads", "nthd,hde->nte", (2, 3, 5), 4, 2, 3),
    _einsum("einsum_stack", "nhi,hio->nho", (2, 5, 3), 2, 5),
    _einsum("einsum_gain", "ntc,c->ntc", (5,), 4, 5),
    _einsum("einsum_dot", "ntc,c->nt", (5,), 4, 5),
    _einsum("einsum_sum", "nti,oi->no", (3, 5), 4, 5),
]

#: Computed once per member.
LISTED_MEMBERS = [
    _linear("normalize", lambda m: F.normalize(m.w, dim=1), **W),
    _linear("over_its_norm", lambda m: m.w / m.w.norm(), **W),
    _linear("over_its_row_norms", lambda m: m.w / torch.linalg.vector_norm(m.w, dim=1, keepdim=True), **W),
    _linear("over_its_matrix_norm", lambda m: m.w / torch.linalg.matrix_norm(m.w), **W),
    _linear("standardised", lambda m: (m.w - m.w.mean(1, keepdim=True)) / (m.w.std(1, keepdim=True) + 0.1), **W),
    _linear("softmax", lambda m: m.w.softmax(-1), **W),
    _linear("log_softmax", lambda m: F.log_softmax(m.w, 0), **W),
    _linear("cumsum", lambda m: m.w.cumsum(1), **W),
    _linear("sorted", lambda m: m.w.sort(1)[0], **W),
    _linear("inverse", lambda m: torch.linalg.inv(_spd(m.w)), **SQUARE),
    _linear("cholesky", lambda m: torch.linalg.cholesky(_spd(m.w)), **SQUARE),
    _linear("solved", lambda m: torch.linalg.solve(_spd(m.w), m.v), w=(5, 5), v=(5, 5)),
    _linear("orthogonal", lambda m: torch.linalg.qr(m.w).Q, **SQUARE),
    _linear("exponential", lambda m: torch.linalg.matrix_exp(0.1 * (m.w - m.w.mT)), **SQUARE),
    _linear("product_of_two", lambda m: m.v @ m.w, w=(2, 5), v=(3, 2)),
    _linear("low_rank_update", lambda m: m.w + torch.mm(m.a, m.b), w=(3, 5), a=(3, 2), b=(2, 5)),
    _linear("outer", lambda m: torch.outer(m.v, m.w), w=(5,), v=(3,)),
    _linear("kron", lambda m: torch.kron(m.v, m.w), w=(1, 5), v=(3, 1)),
    _linear("einsum_of_two", lambda m: torch.einsum("or,ri->oi", m.v, m.w), w=(2, 5), v=(3, 2)),
    _linear("tril", lambda m: m.w.tril(), **SQUARE),
    _linear("triu", lambda m: torch.triu(m.w, 1), **SQUARE),
    _linear("masked_fill", lambda m: m.w.masked_fill(MASK, 0.5), **W),
    _linear("where", lambda m: torch.where(MASK, m.w, m.v), w=(3, 5), v=(3, 5)),
    _linear("hard_threshold", lambda m: torch.where(m.w.abs() > 0.1, m.w, 0.0), **W),
    _linear("flip", lambda m: m.w.flip(0), **W),
    _linear("roll", lambda m: m.w.roll(1, 1), **W),
    _linear("stack", lambda m: torch.stack([m.w, m.v]), w=(5,), v=(5,)),
    _linear("diag", lambda m: torch.diag(m.w), w=(5,)),
    _linear("power_of_two_weights", lambda m: torch.exp(m.w) ** m.v, w=(3, 5), v=(3, 5)),
    _times("sum", lambda m: m.w.sum(), **W),
    _times("sum_of_columns", lambda m: m.w.sum(0), **W),
    _times("mean", lambda m: m.w.mean(0), **W),
    _times("var", lambda m: m.w.var(0), **W),
    _times("max", lambda m: m.w.max(0).values, **W),
    _times("min", lambda m: m.w.min(), **W),
    _times("amax", lambda m: m.w.amax(0), **W),
    _times("determinant", lambda m: torch.linalg.det(_spd(m.w)), **SQUARE),
    _times("logsumexp", lambda m: m.w.logsumexp(0), **W),
    _times("normalized_vector", lambda m: F.normalize(m.w, dim=0), w=(5,)),
]

FUNCTION_CASES = [*CLOSED, *LISTED_MEMBERS]
