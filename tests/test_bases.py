"""Several base perturbations in a batch: exact laws for every case, and the variance α/N + (1/K - 1/N) γ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, Case
from laws import EXACT, distance, oracle, wrap

import flipout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
MEMBERS = 4
TWO = flipout.Flipout(bases=2)


@every_case
def test_equals_the_oracle(case: Case) -> None:
    """Two groups of two members, with one row and with three rows a member."""
    net = wrap(case, flipout.Gaussian(0.3), TWO)
    for rows in (MEMBERS, 3 * MEMBERS):
        x = case.draw_inputs(rows)
        with net.hold(MEMBERS) as draw, torch.no_grad():
            y = net(*x)
            assert distance(y, oracle(net, draw, x)) <= EXACT
            assert distance(y, net.module(*x)) > 1e-6


@every_case
def test_gradients_equal_the_oracles(case: Case) -> None:
    """In means, learnable scales and inputs, where the mean acts through the noise as well."""
    x = [v.requires_grad_(v.is_floating_point()) for v in case.draw_inputs(2 * MEMBERS)]
    for noise in (flipout.Gaussian(0.3, relative=True, learnable=True), flipout.Gaussian(0.3, learnable=True), flipout.DropConnect()):
        net = wrap(case, noise, TWO)
        wanted: list[Any] = [*net.parameters(), *(v for v in x if v.requires_grad)]
        with net.hold(MEMBERS) as draw:
            ours, theirs = (
                torch.autograd.grad((0.1 * y**2 + y).sum(), wanted, materialize_grads=True) for y in (net(*x), oracle(net, draw, x))
            )
        for a, b in zip(ours, theirs, strict=True):
            assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())
