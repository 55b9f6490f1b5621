"""Sums, products and functions of weights and data, entry by entry."""

import torch
from torch.nn import functional as F

from cases.base import Case, floats, given, second

V = {"w": (5,)}
S = {"w": ()}
MASK = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)


def product(pair):
    return pair[0] * pair[1]


VECTORS = [
    Case("add", given(lambda m, x: x + m.w, **V), floats(5), local=True),
    Case("add_reflected", given(lambda m, x: m.w + x, **V), floats(4, 5), local=True),
    Case("add_alpha", given(lambda m, x: torch.add(x, m.w, alpha=-2.5), **V), floats(5), local=True),
    Case("add_alpha_weight_first", given(lambda m, x: torch.add(m.w, x, alpha=3), **V), floats(5), local=True),
    Case("sub", given(lambda m, x: x - m.w, **V), floats(5), local=True),
    Case("sub_reflected", given(lambda m, x: m.w - x, **V), floats(5), local=True),
    Case("rsub_function", given(lambda m, x: torch.rsub(m.w, x), **V), floats(5), local=True),
    Case("mul", given(lambda m, x: x * m.w, **V), floats(4, 5), local=True),
    Case("mul_reflected", given(lambda m, x: m.w * x, **V), floats(5), local=True),
    Case("mul_function", given(lambda m, x: torch.mul(m.w, x), **V), floats(5), local=True),
    Case("div", given(lambda m, x: x / (4 + m.w), **V), floats(5), affine=False, local=True),
    Case("div_reflected", given(lambda m, x: m.w / (4 + x.square()), **V), floats(5), local=True),
    Case("vector_channels", given(lambda m, x: x * m.w[:, None], **V), floats(5, 3), local=True),
    Case("vector_channels_4d", given(lambda m, x: x * m.w.view(1, -1, 1, 1), **V), floats(5, 2, 3), local=True),
    Case("vector_channels_3d", given(lambda m, x: x * m.w.view(-1, 1, 1), **V), floats(5, 2, 3), local=True),
    Case("vector_batch_second", given(lambda m, x: x * m.w + m.w, **V), second(4, 5), batch_dim=1, local=True),
    Case("matrix_of_features", given(lambda m, x: x * m.w, w=(4, 5)), floats(4, 5)),
    Case("matrix_one_column", given(lambda m, x: x * m.w, w=(4, 1)), floats(4, 5)),
    Case("broadcast_tensors", given(lambda m, x: product(torch.broadcast_tensors(x, m.w)), **V), floats(5), local=True),
    Case(
        "broadcast_weight_first",
        given(lambda m, x: product(torch.broadcast_tensors(m.w[:, None], x)), **V),
        floats(5, 3),
        local=True,
    ),
    Case("broadcast_to_column", given(lambda m, x: product(torch.broadcast_tensors(x, m.w)), **V), floats(4, 1), local=True),
    Case(
        "broadcast_weights",
        given(lambda m, x: x * product(torch.broadcast_tensors(m.w, m.v)), w=(5,), v=()),
        floats(5),
        affine=False,
        local=True,
    ),
    Case("vector_broadcasts_data", given(lambda m, x: x * m.w, **V), floats(4, 1), local=True),
]

SCALARS = [
    Case("scalar_mul", given(lambda m, x: x * m.w, **S), floats(5), local=True),
    Case("scalar_add", given(lambda m, x: m.w + x, **S), floats(4, 5), local=True),
    Case("scalar_div", given(lambda m, x: x / (4 + m.w), **S), floats(5), affine=False, local=True),
    Case("scalar_rsub", given(lambda m, x: (1 - m.w) * x, **S), floats(5), local=True),
    Case("scalar_per_row", given(lambda m, x: x * m.w, **S), floats(), local=True),
    Case("one_number", given(lambda m, x: x * m.w, w=(1,)), floats(5), local=True),
    Case("scalar_gate", given(lambda m, x: torch.tanh(m.w) * x, **S), floats(5), affine=False, local=True),
]

CONSTANTS = [
    Case("one_plus", given(lambda m, x: x * (1 + m.w), **V), floats(5), local=True),
    Case("one_minus", given(lambda m, x: x * (1 - m.w), **V), floats(5), local=True),
    Case("one_plus_matrix", given(lambda m, x: F.linear(x, 1 + m.w), w=(3, 5)), floats(5), local=True),
    Case("one_minus_matrix", given(lambda m, x: F.linear(x, 1.0 - m.w), w=(3, 5)), floats(5), local=True),
    Case("half_matrix", given(lambda m, x: F.linear(x, m.w / 2), w=(3, 5)), floats(5), local=True),
    Case("negated_matrix", given(lambda m, x: F.linear(x, -m.w), w=(3, 5)), floats(5), local=True),
    Case("scaled_matrix", given(lambda m, x: F.linear(x, 0.3 * m.w * 5**-0.5), w=(3, 5)), floats(5), local=True),
    Case("equalised", given(lambda m, x: F.linear(x, m.w * torch.tensor(0.5, dtype=x.dtype)), w=(3, 5)), floats(5), local=True),
    Case("masked", given(lambda m, x: F.linear(x, m.w * MASK.to(x.dtype)), w=(3, 5)), floats(5), local=True),
    Case("masked_reflected", given(lambda m, x: F.linear(x, MASK.to(x.dtype) * m.w), w=(3, 5)), floats(4, 5)),
    Case("masked_row", given(lambda m, x: F.linear(x, m.w * MASK[:1].to(x.dtype)), w=(3, 5)), floats(5), local=True),
    Case(
        "shift_alpha",
        given(lambda m, x: F.linear(x, torch.add(MASK.to(x.dtype), m.w, alpha=-2.5)), w=(3, 5)),
        floats(5),
        local=True,
    ),
    Case(
        "shift_alpha_first",
        given(lambda m, x: F.linear(x, torch.sub(m.w, MASK.to(x.dtype), alpha=0.5)), w=(3, 5)),
        floats(5),
        local=True,
    ),
    Case("sum_alpha", given(lambda m, x: F.linear(x, torch.sub(m.w, m.v, alpha=0.5)), w=(3, 5), v=(3, 5)), floats(5)),
    Case("masked_shift", given(lambda m, x: F.linear(x, m.w + MASK.to(x.dtype)), w=(3, 5)), floats(5), local=True),
    Case("masked_kernel", given(lambda m, x: F.conv2d(x, m.w * MASK[:, 2:].to(x.dtype)), w=(3, 2, 3, 3)), floats(2, 4, 4)),
    Case("residual_weight", given(lambda m, x: F.linear(x, m.w + m.v), w=(3, 5), v=(3, 5)), floats(5)),
    Case("difference_of_weights", given(lambda m, x: F.linear(x, m.w - 2 * m.v), w=(3, 5), v=(3, 5)), floats(4, 5)),
    Case("outer_sum", given(lambda m, x: x * (m.w + m.v), w=(5,), v=()), floats(5), local=True),
    Case("product_of_vectors", given(lambda m, x: x * (m.w * m.v), w=(5,), v=(5,)), floats(5), affine=False, local=True),
    Case("softplus_scale", given(lambda m, x: x * F.softplus(m.w), **V), floats(5), affine=False, local=True),
    Case("exponential_scale", given(lambda m, x: x * m.w.exp(), **V), floats(5), affine=False, local=True),
    Case("sigmoid_matrix", given(lambda m, x: F.linear(x, torch.sigmoid(m.w)), w=(3, 5)), floats(5), affine=False),
    Case("squared_scale", given(lambda m, x: x * m.w**2, **V), floats(5), affine=False, local=True),
]

CASES = [*VECTORS, *SCALARS, *CONSTANTS]
