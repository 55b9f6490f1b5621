"""linear, addmm, matmul and its kin on either side, stacks of matrices, bilinear."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.base import Case, Inputs, floats, given, second


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Folded(nn.Module):
    """[N, T, in] as [N·T, in] and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, -2)).view(*x.shape[:-1], 3)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh()), nn.Linear(4, 3))


W = {"w": (3, 5)}  # [out, in]
V = {"w": (5, 3)}  # [in, out]

LAYERS = [
    Case("linear", lambda: nn.Linear(5, 3), floats(5), local=True),
    Case("linear_wide", lambda: nn.Linear(17, 9), floats(17), local=True),
    Case("linear_one_column", lambda: nn.Linear(1, 1), floats(1), local=True),
    Case("linear_no_bias", lambda: nn.Linear(5, 3, bias=False), floats(5), local=True),
    Case("linear_weight_only", lambda: nn.Linear(5, 3), floats(5), exclude=("bias",), local=True),
    Case("linear_bias_only", lambda: nn.Linear(5, 3), floats(5), exclude=("weight",), local=True),
    Case("linear_3d", lambda: nn.Linear(5, 3), floats(4, 5)),
    Case("linear_4d", lambda: nn.Linear(5, 3), floats(2, 3, 5)),
    Case("linear_bias_only_3d", lambda: nn.Linear(5, 3), floats(4, 5), exclude=("weight",), local=True),
    Case("linear_batch_second", lambda: nn.Linear(5, 3), second(4, 5), batch_dim=1),
    Case("linear_batch_third", lambda: nn.Linear(5, 3), lambda n, g: (torch.randn(2, 3, n, 5, generator=g),), batch_dim=2),
    Case("linear_folded", Folded, floats(4, 5)),
    Case("linear_transposed_input", given(lambda m, x: F.linear(x.mT, m.w, m.b), w=(3, 5), b=(3,)), floats(5, 4)),
    Case("linear_shared_operand", given(lambda m, x: F.linear(torch.ones_like(x[:1]), m.w) * x[:, :3], w=(3, 5)), floats(5)),
    Case("mlp", _mlp, floats(5), affine=False, local=True),
    Case("linear_twice", Twice, floats(5), affine=False),
]

MATRICES = [
    Case("addmm", given(lambda m, x: torch.addmm(m.b, x, m.w), w=(5, 3), b=(3,)), floats(5), local=True),
    Case(
        "addmm_scaled", given(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=-2.0), w=(5, 3), b=(3,)), floats(5), local=True
    ),
    Case("addmm_method", given(lambda m, x: x[:, :3].addmm(x, m.w), **V), floats(5), local=True),
    Case("addmm_weight_left", given(lambda m, x: torch.addmm(m.b, m.w, x.t()).t(), w=(3, 5), b=(3, 1)), floats(5)),
    Case("matmul_right", given(lambda m, x: x @ m.w, **V), floats(5), local=True),
    Case("matmul_right_3d", given(lambda m, x: torch.matmul(x, m.w), **V), floats(4, 5)),
    Case("matmul_method", given(lambda m, x: x.matmul(m.w), **V), floats(5), local=True),
    Case("mm", given(lambda m, x: torch.mm(x, m.w), **V), floats(5), local=True),
    Case("mm_method_left", given(lambda m, x: m.w.mm(x.t()).t(), **W), floats(5), local=True),
    Case("matmul_t", given(lambda m, x: x @ m.w.t(), **W), floats(5), local=True),
    Case("matmul_T", given(lambda m, x: x @ m.w.T, **W), floats(5), local=True),
    Case("matmul_mT", given(lambda m, x: x @ m.w.mT, **W), floats(5), local=True),
    Case("matmul_transpose", given(lambda m, x: x @ m.w.transpose(0, 1), **W), floats(5), local=True),
    Case("matmul_transpose_negative", given(lambda m, x: x @ torch.transpose(m.w, -1, -2), **W), floats(5), local=True),
    Case("matmul_swapaxes", given(lambda m, x: x @ m.w.swapaxes(0, 1), **W), floats(5), local=True),
    Case("matmul_permute", given(lambda m, x: x @ m.w.permute(1, 0), **W), floats(5), local=True),
    Case("matmul_left", given(lambda m, x: (m.w @ x.T).T, **W), floats(5), local=True),
    Case("matmul_left_3d", given(lambda m, x: m.w @ x, **W), floats(5, 4)),
    Case("matmul_left_4d", given(lambda m, x: torch.matmul(m.w, x), **W), floats(2, 5, 4)),
    Case("matmul_left_t", given(lambda m, x: m.w.t() @ x, **V), floats(5, 4)),
    Case("matvec_right", given(lambda m, x: x @ m.w, w=(5,)), floats(5), local=True),
    Case("matvec_right_3d", given(lambda m, x: x @ m.w, w=(5,)), floats(4, 5), local=True),
    Case("matvec_left", given(lambda m, x: m.w @ x, w=(5,)), floats(5, 4), local=True),
    Case("stack_right", given(lambda m, x: x @ m.w, w=(2, 5, 3)), floats(2, 4, 5)),
    Case("stack_right_broadcast", given(lambda m, x: x.unsqueeze(1) @ m.w, w=(2, 5, 3)), floats(4, 5)),
    Case("stack_right_inner", given(lambda m, x: x @ m.w, w=(2, 5, 3)), floats(3, 2, 4, 5)),
    Case("stack_left", given(lambda m, x: m.w @ x, w=(2, 3, 5)), floats(2, 5, 4)),
    Case("stack_deep", given(lambda m, x: x @ m.w, w=(2, 3, 5, 4)), floats(2, 3, 1, 5)),
]


def _two(*lead: int) -> Inputs:
    return lambda n, g: (*floats(*lead, 3)(n, g), *floats(*lead, 4)(n, g))


BILINEAR = [
    Case("bilinear", lambda: nn.Bilinear(3, 4, 2), _two(), local=True),
    Case("bilinear_no_bias", lambda: nn.Bilinear(3, 4, 2, bias=False), _two(), local=True),
    Case("bilinear_3d", lambda: nn.Bilinear(3, 4, 2), _two(2)),
    Case("bilinear_bias_only", lambda: nn.Bilinear(3, 4, 2), _two(), exclude=("weight",), local=True),
]

CASES = [*LAYERS, *MATRICES, *BILINEAR]
