"""A perturbed module gives results in the plain module's dtype, whatever those of inputs and parameters, and under autocast."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
from cases import CASES, Case
from cases.functions import CLOSED
from laws import LISTED, MEMBERS, wrap
from torch import Tensor

import flipout

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding=.same.:UserWarning", "ignore:LSTM with projections is not supported", "ignore:Mismatch dtype"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AUTOCAST = (None, torch.bfloat16, torch.float16)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", None: "off"}
#: Layers that oneDNN runs under autocast, whose result for an input in the other half precision is float32, ours in autocast's.
FUSED = ("lstm", "lstm_deep")


def _context(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _plain(net: flipout.Perturbed, x: tuple[Tensor, ...], autocast: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the plain module's result; None where torch cannot run it."""
    try:
        with _context(autocast):  # with gradients, without which torch takes other ways
            return net.module(*x).dtype
    except (RuntimeError, ValueError):
        return None


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("case", [*CASES, *CLOSED], ids=str)
def test_the_result_has_the_plain_modules_dtype(case: Case, estimator: str) -> None:
    if estimator == "low_rank" and not case.held_to("low rank"):
        pytest.skip("refused by name")
    wrong = []
    for of_parameters in DTYPES:
        net = wrap(case, flipout.Gaussian(0.1, learnable=True), LISTED[estimator], of_parameters)
        for of_input, autocast in itertools.product(DTYPES, AUTOCAST):
            if case.name in FUSED and {of_input, autocast} == {torch.bfloat16, torch.float16}:
                continue
            x = case.draw_inputs(MEMBERS, of_input)
            expected = _plain(net, x, autocast)
            if expected is None:
                continue
            told = f"parameters {NAMES[of_parameters]}, input {NAMES[of_input]}, autocast {NAMES[autocast]}"
            with net.hold(MEMBERS):
                try:
                    with _context(autocast):
                        y = net(*x)
                    y.float().sum().backward()
                except RuntimeError as error:
                    wrong.append(f"{told}: {error}")
                    continue
            if y.dtype != expected:
                wrong.append(f"{told}: {y.dtype} instead of {expected}")
    assert not wrong, "\n".join(wrong)
