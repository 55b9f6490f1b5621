"""Exact laws, put to every case under every estimator: what a perturbed module returns is what its members' weights give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CASES, Case
from laws import EXACT, LISTED, MEMBERS, distance, oracle, pair_id, pairs, wrap
from torch import Tensor

import flipout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")  # torch itself says so of even kernels
every_pair = pytest.mark.parametrize(("case", "estimator"), pairs(), ids=pair_id)
every_noisy_pair = pytest.mark.parametrize(("case", "estimator"), pairs(["flipout", "flipout_bits", "low_rank"]), ids=pair_id)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_pair
def test_equals_the_oracle(case: Case, estimator: str) -> None:
    """With one row a member, and with three in member-major blocks."""
    net = wrap(case, flipout.Gaussian(0.3), LISTED[estimator])
    for rows in (MEMBERS, 3 * MEMBERS):
        x = case.draw_inputs(rows)
        with net.hold(MEMBERS) as draw, torch.no_grad():
            y = net(*x)
            assert distance(y, oracle(net, draw, x)) <= EXACT
            assert distance(y, net.module(*x)) > 1e-6


def _derivatives(y: Tensor, wanted: list[Tensor], twice: bool) -> list[Tensor]:
    """First derivatives of a curved function of y, and the derivatives of their squared norm."""
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    loss = (weights * y + 0.1 * y**2).sum()
    if not twice:
        return list(torch.autograd.grad(loss, wanted, materialize_grads=True))
    first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(sum((g * g).sum() for g in first), wanted, materialize_grads=True)
    return [*first, *second]


@every_pair
def test_derivatives_equal_the_oracles(case: Case, estimator: str) -> None:
    """First and second derivatives in means, learnable scales and inputs, where the mean acts through the noise as well."""
    net = wrap(case, flipout.Gaussian(0.3, relative=True, learnable=True), LISTED[estimator])
    x = [v.requires_grad_(v.is_floating_point()) for v in case.draw_inputs(2 * MEMBERS)]
    wanted: list[Any] = [*net.parameters(), *(v for v in x if v.requires_grad)]
    with net.hold(MEMBERS) as draw:
        ours, theirs = (_derivatives(y, wanted, case.held_to("second derivatives")) for y in (net(*x), oracle(net, draw, x)))
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


@every_noisy_pair
def test_fixed_noise_has_the_oracles_gradients(case: Case, estimator: str) -> None:
    """Where nothing needs the gradient of the perturbation, its product is skipped; the others must not change."""
    net = wrap(case, flipout.Rademacher(0.3), LISTED[estimator])
    x = case.draw_inputs(MEMBERS)
    wanted = list(net.parameters())
    with net.hold(MEMBERS) as draw:
        ours, theirs = (torch.autograd.grad(y.square().sum(), wanted, allow_unused=True) for y in (net(*x), oracle(net, draw, x)))
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        assert b is not None
        assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


@every_case
def test_vanishing_noise_is_the_plain_module(case: Case) -> None:
    net = wrap(case, flipout.Gaussian(1e-300), flipout.Flipout())
    x = case.draw_inputs(MEMBERS)
    with net.hold(MEMBERS):
        assert distance(net(*x), net.module(*x)) <= EXACT


@every_case
def test_evaluation_is_the_plain_module_exactly(case: Case) -> None:
    net = wrap(case, flipout.Gaussian(0.3), flipout.Flipout())
    x, plain = case.draw_inputs(MEMBERS), copy.deepcopy(net.module)  # torch 2.6 rounds tracked statistics anew at every call
    assert torch.equal(net(*x), plain(*x))


@every_case
def test_two_forwards_before_one_backward(case: Case) -> None:
    net = wrap(case, flipout.Gaussian(0.3, learnable=True), flipout.Flipout())
    inputs = case.draw_inputs(MEMBERS), case.draw_inputs(MEMBERS, seed=5)
    wanted = list(net.parameters())

    def outputs() -> list[Tensor]:
        assert net.generator is not None
        net.generator.manual_seed(7)
        with net.sampling():
            return [net(*x).square().sum() for x in inputs]

    joint = torch.autograd.grad(sum(outputs()), wanted, materialize_grads=True)
    single = [torch.autograd.grad(outputs()[i], wanted, materialize_grads=True) for i in range(2)]
    for together, first, second in zip(joint, *single, strict=True):
        assert distance(together, first + second) <= EXACT * max(1.0, together.abs().max().item())


@every_case
def test_a_fresh_draw_serves_a_batch(case: Case) -> None:
    """Without hold() every row is a member; equal seeds give equal outputs and different seeds do not."""
    net = wrap(case, flipout.Gaussian(0.3), flipout.Flipout())
    x, state = case.draw_inputs(MEMBERS), copy.deepcopy(net.state_dict())

    def output(seed: int) -> Tensor:
        assert net.generator is not None
        net.load_state_dict(state)
        net.generator.manual_seed(seed)
        with net.sampling(), torch.no_grad():
            return net(*x)

    assert torch.equal(output(0), output(0))
    assert not torch.equal(output(0), output(1))


@every_pair
def test_an_empty_batch_stays_empty(case: Case, estimator: str) -> None:
    net = wrap(case, flipout.Gaussian(0.3), LISTED[estimator])
    x = case.draw_inputs(0)
    try:
        expected = net.module(*x)
    except (RuntimeError, ValueError, IndexError) as error:
        pytest.skip(f"torch itself refuses: {error}")
    with net.sampling():
        y = net(*x)
    assert y.shape == expected.shape
    y.sum().backward()


@every_case
def test_a_single_row(case: Case) -> None:
    net = wrap(case, flipout.Gaussian(0.3), flipout.Flipout())
    x = case.draw_inputs(1)
    with net.hold(1) as draw:
        assert distance(net(*x), oracle(net, draw, x)) <= EXACT


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("case", "estimator"), pairs(["flipout", "independent", "low_rank"]), ids=pair_id)
def test_autocast_keeps_the_plain_dtype(case: Case, estimator: str) -> None:
    net = wrap(case, flipout.Gaussian(0.1, learnable=True), LISTED[estimator], torch.float32)
    x = case.draw_inputs(MEMBERS, torch.float32)
    with net.hold(MEMBERS), torch.autocast("cpu", torch.bfloat16):
        y = net(*x)
        try:
            assert y.dtype == net.module(*x).dtype
        except RuntimeError as error:  # an LSTM, where the processor has no bfloat16
            if "could not create a primitive" not in str(error):
                raise
    y.float().sum().backward()
    assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in net.parameters())


@every_case
def test_local_reparameterization_serves_or_refuses(case: Case) -> None:
    net = wrap(case, flipout.Gaussian(0.3), flipout.LocalReparameterization())
    x = case.draw_inputs(MEMBERS)
    with net.sampling():
        if case.local:
            assert net(*x).shape == net.module(*x).shape
        else:
            with pytest.raises((flipout.UnsupportedNoiseError, flipout.MissingRuleError)):
                net(*x)


#: One case a hand-written backward; the second derivatives of all others are judged by the oracle's alone.
CURVATURE = {"linear", "linear_no_bias", "mlp", "conv2d", "conv_transpose1d", "bilinear", "embedding", "layer_norm", "mul"}


@every_case
def test_gradients_match_finite_differences(case: Case) -> None:
    if not case.held_to("finite differences"):
        pytest.skip(case.exempt["finite differences"])
    net = wrap(case, flipout.Gaussian(0.3, relative=True, learnable=True), flipout.Flipout())
    x = [v.requires_grad_(v.is_floating_point()) for v in case.draw_inputs(MEMBERS)]
    tensors = [*net.parameters(), *(v for v in x if v.requires_grad)]
    with net.hold(MEMBERS):
        assert torch.autograd.gradcheck(lambda *_: net(*x), tensors, fast_mode=True)
        if case.name in CURVATURE:
            assert torch.autograd.gradgradcheck(lambda *_: net(*x), tensors, fast_mode=True)
