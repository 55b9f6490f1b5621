"""On the device "meta", which has shapes and no numbers, a perturbed module gives results of the plain module's shape."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from laws import LISTED, MEMBERS

import flipout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case, estimator: str) -> None:
    if estimator == "low_rank" and not case.held_to("low rank"):
        pytest.skip("refused by name")
    module = case.build(torch.float32).to("meta")
    x = [v.to("meta") for v in case.draw_inputs(2 * MEMBERS, torch.float32)]
    x = [v.requires_grad_(v.is_floating_point()) for v in x]
    try:
        expected = module(*x)
        expected.sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch itself cannot run it on meta: {error}")
    module.zero_grad()
    for noise in (flipout.Gaussian(0.3), flipout.Gaussian(0.3, relative=True, learnable=True), flipout.Rademacher(0.3)):
        net = flipout.Perturbed(module, noise, LISTED[estimator], exclude=case.exclude, batch_dim=case.batch_dim)
        with net.hold(MEMBERS):
            y = net(*x)
        assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
        y.sum().backward()
        assert all(p.grad is not None and p.grad.is_meta for p in net.parameters())
