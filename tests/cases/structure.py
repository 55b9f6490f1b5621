"""What models do to a weight before they use it: views, slices, casts, joins."""

import torch
from torch.nn import functional as F

from cases.base import Case, floats, given, indices

W = {"w": (3, 5)}
DETACHED = {
    "finite differences": "detach() hides one of the two uses of the weight from the gradient",
    "theory": "the gradient sees one of the two uses of the weight",
}
QKV = {"w": (9, 5)}


def _qkv(cut):  # type: ignore[no-untyped-def]
    """Queries, keys and values from one fused matrix, cut three ways."""

    def forward(m, x):  # type: ignore[no-untyped-def]
        q, k, v = (F.linear(x, part) for part in cut(m.w))
        return q * k + v

    return forward


VIEWS = [
    Case("view_of_vector", given(lambda m, x: F.linear(x, m.w.view(3, 5)), w=(15,)), floats(5), local=True),
    Case("reshape_there_and_back", given(lambda m, x: F.linear(x, m.w.reshape(15).reshape(3, 5)), **W), floats(5), local=True),
    Case("reshape_mixed", given(lambda m, x: F.linear(x, m.w.reshape(5, 3)), **W), floats(3), local=True),
    Case("reshape_minus_one", given(lambda m, x: F.linear(x, m.w.reshape(-1, 5)), w=(3, 1, 5)), floats(5), local=True),
    Case("view_as", given(lambda m, x: F.linear(x, m.w.view_as(m.v) + m.v), w=(15,), v=(3, 5)), floats(5)),
    Case("flatten_rows", given(lambda m, x: F.linear(x, m.w.flatten(0, 1)), w=(2, 3, 5)), floats(5), local=True),
    Case("flatten_columns", given(lambda m, x: F.linear(x, torch.flatten(m.w, 1)), w=(3, 2, 5)), floats(10), local=True),
    Case("unflatten", given(lambda m, x: x @ m.w.unflatten(0, (2, 3)), w=(6, 4)), floats(2, 5, 3)),
    Case("squeeze", given(lambda m, x: F.linear(x, m.w.squeeze(1)), w=(3, 1, 5)), floats(5), local=True),
    Case("unsqueeze_kernel", given(lambda m, x: F.conv1d(x, m.w.unsqueeze(-1)), **W), floats(5, 4)),
    Case("kernel_as_matrix", given(lambda m, x: F.linear(x, m.w.flatten(1)), w=(3, 2, 2, 2)), floats(8), local=True),
    Case("kernel_flipped_axes", given(lambda m, x: F.conv2d(x, m.w.transpose(0, 1)), w=(2, 3, 2, 2)), floats(2, 4, 4)),
    Case("movedim", given(lambda m, x: F.conv1d(x, m.w.movedim(0, -1)), w=(2, 3, 4)), floats(4, 5)),
    Case("permute_stack", given(lambda m, x: x @ m.w.permute(1, 2, 0), w=(4, 2, 5)), floats(2, 3, 5)),
    Case("expand_rows", given(lambda m, x: F.linear(x, m.w.expand(7, 5)), w=(1, 5)), floats(5)),
    Case("expand_vector", given(lambda m, x: F.linear(x, m.w.expand(7, 5)), w=(5,)), floats(5), local=True),
    Case("heads", given(lambda m, x: x * m.w.view(1, 2, 1, 3), w=(6,)), floats(2, 4, 3), local=True),
]

CASTS = [
    Case("clone", given(lambda m, x: F.linear(x, m.w.clone()), **W), floats(5), local=True),
    Case("detach", given(lambda m, x: F.linear(x, m.w.detach()) + F.linear(x, m.w), **W), floats(5), exempt=DETACHED),
    Case("contiguous", given(lambda m, x: x @ m.w.t().contiguous(), **W), floats(5), local=True),
    Case("to_own_dtype", given(lambda m, x: F.linear(x, m.w.to(x.dtype)), **W), floats(5), local=True),
    Case("to_like", given(lambda m, x: F.linear(x, m.w.to(x)), **W), floats(5), local=True),
    Case("type_as", given(lambda m, x: F.linear(x, m.w.type_as(x)), **W), floats(4, 5)),
]

SLICES = [
    Case("qkv_chunk", given(_qkv(lambda w: w.chunk(3)), **QKV), floats(4, 5), affine=False),
    Case("qkv_split", given(_qkv(lambda w: w.split(3)), **QKV), floats(4, 5), affine=False),
    Case("qkv_split_sizes", given(_qkv(lambda w: torch.split(w, [3, 3, 3], 0)), **QKV), floats(5), affine=False),
    Case("qkv_index", given(_qkv(lambda w: (w[:3], w[3:6], w[6:])), **QKV), floats(5), affine=False),
    Case("qkv_narrow", given(_qkv(lambda w: [w.narrow(0, i, 3) for i in (0, 3, -3)]), **QKV), floats(5), affine=False),
    Case("qkv_view_unbind", given(_qkv(lambda w: w.view(3, 3, 5).unbind(0)), **QKV), floats(5), affine=False),
    Case("columns", given(lambda m, x: F.linear(x[:, 1:4], m.w[:, 1:4]), **W), floats(5), local=True),
    Case("columns_step", given(lambda m, x: F.linear(x[:, ::2], m.w[:, ::2]), **W), floats(5), local=True),
    Case("columns_ellipsis", given(lambda m, x: F.linear(x[..., :2], m.w[..., :2]), **W), floats(4, 5)),
    Case("columns_chunk", given(lambda m, x: F.linear(x[..., :3], m.w.chunk(2, -1)[0]), **W), floats(4, 5)),
    Case("single_row", given(lambda m, x: x * m.w[1], **W), floats(5)),
    Case("single_row_select", given(lambda m, x: x * m.w.select(0, -1), **W), floats(4, 5)),
    Case("single_entry", given(lambda m, x: x * m.w[1, -2], **W), floats(5)),
    Case("new_axis", given(lambda m, x: x * m.w[None, :, None], w=(5,)), floats(5, 3), local=True),
    Case("iterated", given(lambda m, x: sum(x * row for row in m.w), **W), floats(5)),
    Case("index_select", given(lambda m, x: F.linear(x, m.w.index_select(0, torch.tensor([2, 0, 2]))), **W), floats(5)),
    Case("bias_chunks", given(lambda m, x: x * m.w.chunk(2)[0] + m.w.chunk(2)[1], w=(10,)), floats(5), local=True),
    Case("kernel_slice", given(lambda m, x: F.conv1d(x[:, :2], m.w[1:, :2]), w=(4, 3, 2)), floats(3, 4)),
]

JOINS = [
    Case("cat_rows", given(lambda m, x: F.linear(x, torch.cat([m.w, m.v])), w=(3, 5), v=(2, 5)), floats(5)),
    Case("cat_columns", given(lambda m, x: F.linear(x, torch.cat([m.w, m.v], 1)), w=(3, 2), v=(3, 3)), floats(4, 5)),
    Case("cat_plain", given(lambda m, x: F.linear(x, torch.cat([m.w, MASK_ROW.to(x.dtype)], -2)), **W), floats(5), local=True),
    Case("cat_vectors", given(lambda m, x: x * torch.cat([m.w, m.v]), w=(3,), v=(2,)), floats(5), local=True),
    Case("cat_kernels", given(lambda m, x: F.conv1d(x, torch.cat([m.w, m.v], 1)), w=(4, 2, 2), v=(4, 1, 2)), floats(3, 4)),
    Case("cat_tables", given(lambda m, i: F.embedding(i, torch.cat([m.w, m.v])), w=(4, 3), v=(3, 3)), indices(7, 2)),
]

MASK_ROW = torch.arange(5.0, dtype=torch.float64)[None]

CASES = [*VIEWS, *CASTS, *SLICES, *JOINS]
