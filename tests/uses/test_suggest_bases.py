"""How many bases a batch needs: what is predicted with them, and what is refused."""

from __future__ import annotations

import pytest

import flipout
from flipout.variance import VarianceComponents, suggest_bases


def components(gamma: float) -> VarianceComponents:
    return VarianceComponents({"w": ((100.0, 4.0, 0.8 * gamma), (102.0, 5.0, 1.2 * gamma))}, {"w": 3}, batch_size=64, draws=40)


@pytest.mark.parametrize("efficiency", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("n", [1, 48, 8192])
def test_enough_bases_and_no_fewer(n: int, efficiency: float) -> None:
    """The batch is worth what was asked for; with the next smaller divisor it is not."""
    found = components(0.7)
    ideal = found.predict("independent", n).value
    told = suggest_bases(n, components=found, efficiency=efficiency)
    assert ideal / found.predict("flipout", n, bases=told.bases).value >= efficiency - 1e-9
    for fewer in [k for k in range(1, told.bases) if n % k == 0][-1:]:
        assert ideal / found.predict("flipout", n, bases=fewer).value < efficiency
    assert told.as_dict()["bases"] == told.bases


def test_predictions_run_from_one_base_to_independence() -> None:
    found = components(0.7)
    assert found.predict("flipout", 64, bases=1).value == found.predict("flipout", 64).value
    assert found.predict("flipout", 64, bases=64).value == pytest.approx(found.predict("independent", 64).value)


def test_no_gamma_needs_one_base() -> None:
    assert suggest_bases(64, components=components(-0.1)).bases == 1


def test_bad_questions_are_refused_by_name() -> None:
    found = components(0.7)
    for wrong, named in (({"batch_size": 0}, "batch_size"), ({"batch_size": 8, "efficiency": 1.0}, "efficiency")):
        with pytest.raises(flipout.ArgumentError, match=named):
            suggest_bases(components=found, **wrong)  # type: ignore[arg-type]
    with pytest.raises(flipout.ArgumentError, match="suggest_bases needs net"):
        suggest_bases(8)
    with pytest.raises(flipout.ArgumentError, match="bases=3 does not divide"):
        found.predict("flipout", 8, bases=3)


def test_micro_batches_hold_members_of_every_base() -> None:
    import torch
    from torch import nn

    net = flipout.Perturbed(nn.Linear(2, 1), flipout.Gaussian(0.1), flipout.Flipout(bases=4))

    def sample_batch(n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, 2, generator=generator)

    def loss_fn(net: flipout.Perturbed, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = net(x).square().mean()
        return loss

    measured = flipout.variance.gradient_variance(
        net, loss_fn, sample_batch, batch_size=16, estimators=(net.estimator,), draws=8, micro_batch=8
    )
    assert next(iter(measured.values())).total.value > 0
    with pytest.raises(flipout.ArgumentError, match="at least 4 rows"):
        flipout.variance.gradient_variance(
            net, loss_fn, sample_batch, batch_size=16, estimators=(net.estimator,), draws=8, micro_batch=2
        )
