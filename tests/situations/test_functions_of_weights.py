"""Functions of perturbed weights: each member's own, exact in value and derivatives, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.base import Case, floats, given
from cases.functions import CLOSED, FUNCTION_CASES, LISTED_MEMBERS
from laws import EXACT, LISTED, MEMBERS, distance, oracle
from torch import Tensor, nn

import flipout

LOOPED: dict[str, flipout.Estimator] = {key: LISTED[key] for key in ("flipout", "low_rank", "independent", "shared")}


def wrap(case: Case, estimator: flipout.Estimator, fallback: str | None) -> flipout.Perturbed:
    noise = flipout.Gaussian(0.3, relative=True, learnable=True)
    generator = torch.Generator().manual_seed(2)
    return flipout.Perturbed(
        case.build(), noise, estimator, exclude=case.exclude, batch_dim=case.batch_dim, generator=generator, fallback=fallback
    ).eval()


def _derivatives(y: Tensor, wanted: list[Tensor], twice: bool) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    loss = (weights * y + 0.1 * y**2).sum()
    first = torch.autograd.grad(loss, wanted, create_graph=twice, materialize_grads=True)
    if not twice:
        return list(first)
    return [*first, *torch.autograd.grad(sum((g * g).sum() for g in first), wanted, materialize_grads=True)]


def _require_the_oracles(net: flipout.Perturbed, case: Case) -> None:
    for rows in (MEMBERS, 2 * MEMBERS):
        x = [v.requires_grad_() for v in case.draw_inputs(rows)]
        wanted: list[Any] = [*net.parameters(), *x]
        with net.hold(MEMBERS) as draw:
            y, expected = net(*x), oracle(net, draw, x)
            assert distance(y, expected) <= EXACT * max(1.0, expected.abs().max().item())
            ours, theirs = (_derivatives(value, wanted, case.held_to("second derivatives")) for value in (y, expected))
        for a, b in zip(ours, theirs, strict=True):
            assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("case", FUNCTION_CASES, ids=str)
def test_exact_under_independent(case: Case) -> None:
    _require_the_oracles(wrap(case, flipout.Independent(), None), case)


@pytest.mark.parametrize("estimator", LOOPED)
@pytest.mark.parametrize("case", FUNCTION_CASES, ids=str)
def test_exact_under_the_loop(case: Case, estimator: str) -> None:
    _require_the_oracles(wrap(case, LOOPED[estimator], "loop"), case)


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("case", CLOSED, ids=str)
def test_closed_forms_need_no_loop(case: Case, estimator: str) -> None:
    _require_the_oracles(wrap(case, LISTED[estimator], None), case)


@pytest.mark.parametrize("estimator", ["flipout", "low_rank", "independent"])
@pytest.mark.parametrize("case", [case for case in CLOSED if not case.held_to("second derivatives")], ids=str)
def test_second_derivatives_match_finite_differences_where_torchs_do_not(case: Case, estimator: str) -> None:
    net = wrap(case, LISTED[estimator], None)
    (x,) = case.draw_inputs(MEMBERS)
    with net.hold(MEMBERS):
        assert torch.autograd.gradgradcheck(lambda *_: net(x), list(net.parameters()), fast_mode=True)


SERVED = {
    ("hard_threshold", "flipout"),
    ("hard_threshold", "low_rank"),
    ("outer", "low_rank"),
    ("stack", "low_rank"),
    ("diag", "low_rank"),
    ("normalized_vector", "low_rank"),
}


@pytest.mark.parametrize("estimator", ["flipout", "low_rank"])
@pytest.mark.parametrize("case", LISTED_MEMBERS, ids=str)
def test_refused_by_name_without_the_loop_or_exact(case: Case, estimator: str) -> None:
    """What would cost more memory is refused; values that are listed already (a vector of LowRank, a result of exp()) cost none."""
    net = wrap(case, LISTED[estimator], None)
    try:
        with net.sampling():
            net(*case.draw_inputs(MEMBERS))
    except flipout.MissingRuleError as error:
        assert 'fallback="loop"' in str(error)  # noqa: PT017  (or it is served)
    else:
        assert (case.name, estimator) in SERVED
        _require_the_oracles(net, case)


@pytest.mark.parametrize("case", LISTED_MEMBERS, ids=str)
def test_per_token_weights_have_no_functions(case: Case) -> None:
    net = wrap(case, flipout.Flipout(granularity="token"), "loop")
    with net.sampling(), pytest.raises((flipout.MissingRuleError, flipout.errors.DrawError)):
        net(*case.draw_inputs(MEMBERS))


@pytest.mark.parametrize("case", FUNCTION_CASES, ids=str)
def test_an_empty_batch_stays_empty(case: Case) -> None:
    net = wrap(case, flipout.Independent(), None)
    x = case.draw_inputs(0)
    with net.sampling():
        assert net(*x).shape == net.module(*x).shape


def test_a_constant_that_could_be_data_is_refused() -> None:
    """A plain tensor with as many entries as there are rows may be the examples: no member is to see all of them."""
    case = Case("outer", given(lambda m, x: torch.outer(m.w, x[:, 0]).T, w=(3,)), floats(5))
    net = wrap(case, flipout.Independent(), None)
    with net.sampling(), pytest.raises(flipout.MissingRuleError, match="outer"):
        net(*case.draw_inputs(4))


def test_a_result_that_is_no_tensor_is_refused() -> None:
    case = Case("equal", given(lambda m, x: x * float(torch.equal(m.w, m.w)), w=(3,)), floats(3))
    with wrap(case, flipout.Independent(), None).sampling() as net, pytest.raises(flipout.MissingRuleError, match="equal"):
        net(*case.draw_inputs(4))


@pytest.mark.parametrize("make", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_learns_its_vectors_from_the_mean(make: Any) -> None:
    """In training mode u and v move as the plain module's do, and every member is divided by its own uᵀ W_n v."""
    torch.manual_seed(0)
    ours, plain = make(nn.Linear(5, 3).double()), make(nn.Linear(5, 3).double())
    plain.load_state_dict(ours.state_dict())
    net = flipout.Perturbed(ours, flipout.Gaussian(0.3)).train()
    x = torch.randn(MEMBERS, 5, dtype=torch.float64)
    with net.hold(MEMBERS) as draw:
        y = net(x)
        plain.train()(x)
        for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
            assert torch.equal(a, b)
        net.eval()
        assert distance(y, oracle(net, draw, [x])) <= EXACT
    y.sum().backward()


def test_the_error_names_the_loop_only_where_it_can_run() -> None:
    def told(function: Any, **options: Any) -> str:
        case = Case("f", given(lambda m, x: x * function(m.w), w=(3,)), floats(3))
        net = flipout.Perturbed(case.build(), flipout.Gaussian(0.1), **options)
        with pytest.raises(flipout.MissingRuleError) as caught:
            net(*case.draw_inputs(4))
        return str(caught.value)

    loop = 'fallback="loop"'
    assert loop in told(lambda w: w.softmax(0))
    assert "Independent()" not in told(lambda w: w.softmax(0))
    assert "Independent()" in told(lambda w: w.softmax(0), estimator=flipout.Flipout(granularity="token"))
    for impossible in (lambda w: w.add_(1), lambda w: w.tolist(), lambda w: torch.add(w, 1, out=torch.empty(3))):
        assert loop not in told(impossible, fallback="loop")
        assert loop not in told(impossible)
