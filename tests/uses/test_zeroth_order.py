"""Gradients from losses alone: equal to a loop over dense perturbations, unbiased, the same again, and no heavier than promised."""

import math

import pytest
import torch
from laws import Z_LIMIT, distance, worst, z_difference, z_mean
from torch import nn
from torch.func import functional_call, grad, vmap

import flipout
from flipout.evolution import ZerothOrder
from flipout.gradients import stream

ROWS, WIDTH = 12, 5
ESTIMATORS = {"flipout": flipout.Flipout(), "low_rank": flipout.LowRank(2), "independent": flipout.Independent()}


def make(hidden=4):
    generator = stream(0)
    module = nn.Sequential(
        nn.Linear(WIDTH, hidden), nn.Tanh(), nn.LayerNorm(hidden), nn.Dropout(0.5), nn.Linear(hidden, 2)
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return module


def data(rows=ROWS):
    generator = stream(1)
    x, y = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (WIDTH, 2))
    return {"x": x, "y": y}


def losses(module, batch):
    return (module(batch["x"]) - batch["y"]).square().sum(1)


def gradients(zeroth, batch, **options):
    zeroth.module.zero_grad()
    loss = zeroth.backward(losses, batch, **options)
    return loss, {name: parameter.grad for name, parameter in zeroth.module.named_parameters()}


def row_loss(module, direction, batch, sign):
    """The loss of each row under one dense perturbation."""
    weights = {name: parameter + sign * direction[name] for name, parameter in module.named_parameters()}
    return losses(lambda x: functional_call(module, weights, (x,)), batch)


def by_hand(zeroth, batch):
    """The update by a loop over the dense directions."""
    module, generation = zeroth.module.eval(), zeroth.generation
    own = zeroth.directions == "example"
    count = len(batch["x"]) if own else zeroth.directions
    total = {name: torch.zeros_like(parameter) for name, parameter in module.named_parameters()}
    found, directions = [], []
    for n in range(count):
        directions.append(zeroth.direction(generation, n))
        up = row_loss(module, directions[n], batch, 1)
        down = row_loss(module, directions[n], batch, -1) if zeroth.antithetic else row_loss(module, directions[n], batch, 0)
        found.append((up[n], down[n]) if own else (up.mean(), down.mean()))
    up, down = (torch.stack(side) for side in zip(*found, strict=True))
    weights = (up - down) / ((2 if zeroth.antithetic else 1) * zeroth.std**2 * count)
    if zeroth.normalize:
        weights = weights * zeroth.std / (torch.cat([up, down]) if zeroth.antithetic else up).std()
    for weight, direction in zip(weights, directions, strict=True):
        for name in total:
            total[name] += weight * direction[name]
    return ((up + down) / 2 if zeroth.antithetic else down).mean(), total


SETTINGS = [
    {"directions": "example"},
    {"directions": "example", "antithetic": False},
    {"directions": 1},
    {"directions": 1, "base": "gaussian"},  # MeZO
    {"directions": 4, "antithetic": False, "normalize": True},  # FZOO
    {"directions": 4, "normalize": True, "chunk": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@torch.no_grad()
def test_equals_a_loop_over_dense_directions(estimator, settings):
    zeroth = ZerothOrder(make(), 0.1, estimator=ESTIMATORS[estimator], seed=3, **settings)
    for _ in range(2):
        expected = by_hand(zeroth, data())
        loss, found = gradients(zeroth, data())
        assert float(loss) == pytest.approx(float(expected[0]), rel=1e-9)
        assert all(distance(found[name], expected[1][name]) < 1e-8 for name in found)
    assert zeroth.generation == 2


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("directions", ["example", 2])
def test_unbiased_where_the_loss_is_quadratic(estimator, directions):
    """There the smoothed gradient is the gradient, however large σ is."""
    module = nn.Linear(WIDTH, 2).double()
    zeroth = ZerothOrder(module, 0.5, directions=directions, estimator=ESTIMATORS[estimator])
    losses(module, data()).mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    found = torch.stack([torch.cat([g.flatten() for g in gradients(zeroth, data())[1].values()]) for _ in range(100)])
    assert worst(z_mean(found, expected)) < Z_LIMIT


def test_unbiased_for_the_gradient_of_the_smoothed_loss():
    """Gaussian noise on a net that bends: the mean of autograd's gradients over the same noise (Stein's identity)."""
    module, batch, std = make(), data(), 0.3
    zeroth = ZerothOrder(module, std, base="gaussian", estimator=flipout.Independent())
    found = torch.stack([torch.cat([g.flatten() for g in gradients(zeroth, batch)[1].values()]) for _ in range(100)])
    parameters, generator = dict(module.eval().named_parameters()), stream(7)
    slope = vmap(grad(lambda weights: losses(lambda x: functional_call(module, weights, (x,)), batch).mean()))
    noisy = {
        name: p.detach() + std * torch.randn(2000, *p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()
    }
    expected = torch.cat([g.flatten(1) for g in slope(noisy).values()], 1)
    assert worst(z_difference(found, expected)) < Z_LIMIT


def test_a_direction_for_each_example_has_less_variance_at_the_same_passes():
    module, batch = make(), data(64)
    spread = {}
    for directions in ("example", 1):
        zeroth = ZerothOrder(module, 1e-3, directions=directions)
        found = torch.stack([torch.cat([g.flatten() for g in gradients(zeroth, batch)[1].values()]) for _ in range(40)])
        spread[directions] = float(found.var(0).sum())
    assert spread["example"] < spread[1] / 4


def test_adds_to_what_is_there_and_scales():
    zeroth, batch = ZerothOrder(make(), 0.1), data()
    _, first = gradients(zeroth, batch)
    first = {name: value.clone() for name, value in first.items()}
    zeroth.generation = 0
    gradients(zeroth, batch, scale=0.25)
    zeroth.generation = 0
    zeroth.backward(losses, batch, scale=0.75)
    assert all(distance(parameter.grad, first[name]) < 1e-12 for name, parameter in zeroth.module.named_parameters())


def test_a_resumed_run_goes_on_to_the_same_bits():
    batch, whole, state = data(), [], {}
    for resumed in (False, True):
        zeroth = ZerothOrder(make(), 0.1, seed=5)
        optimiser = torch.optim.SGD(zeroth.module.parameters(), lr=0.01)
        if resumed:
            zeroth.module.load_state_dict(state["module"])
            zeroth.load_state_dict(state["zeroth"])
        for _ in range(3 if resumed else 6):
            gradients(zeroth, batch)
            optimiser.step()
            if zeroth.generation == 3 and not resumed:
                state = {
                    "module": {name: value.clone() for name, value in zeroth.module.state_dict().items()},
                    "zeroth": zeroth.state_dict(),
                }
        whole.append(torch.cat([p.detach().flatten() for p in zeroth.module.parameters()]))
    assert torch.equal(*whole)
    with pytest.raises(flipout.ArgumentError, match=r"std was 0\.1 and is 0\.2"):
        ZerothOrder(make(), 0.2, seed=5).load_state_dict(state["zeroth"])


def test_the_module_is_as_it_was_also_where_losses_raise():
    module = make()
    module[0].eval()
    modes = [part.training for part in module.modules()]
    zeroth, weights = ZerothOrder(module), [p.clone() for p in module.parameters()]

    def broken(module, batch):
        assert not any(part.training for part in module.modules())
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        zeroth.backward(broken, data())
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None for parameter in module.parameters())
    assert zeroth.generation == 0
    zeroth.backward(losses, data())
    assert all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True))


def test_frozen_and_excluded_parameters_get_no_gradient():
    module = make()
    module[0].weight.requires_grad_(False)
    ZerothOrder(module, exclude="2.*").backward(losses, data())
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"0.bias", "4.weight", "4.bias"}


def test_a_matrix_of_bfloat16_keeps_steps_below_the_spacing_of_its_weights():
    """W̄ + ΔW in bfloat16 is W̄ where ΔW is a hundredth of a weight's spacing; the rows see ΔW all the same."""
    module = nn.Linear(64, 1, bias=False).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    std = 2.0**-12
    assert torch.equal(module.weight + std, module.weight)
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    x[torch.arange(8), torch.arange(8)], x[torch.arange(8), torch.arange(8) + 8] = 1.0, -1.0  # the means cancel
    zeroth = ZerothOrder(module, std, exclude=())
    zeroth.backward(lambda module, x: module(x).float().squeeze(1), x)
    assert int((module.weight.grad != 0).sum()) > 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"std": 0.0}, "std=0.0"),
        ({"directions": "batch"}, "directions='batch'"),
        ({"directions": 0}, "directions=0"),
        ({"normalize": True}, "normalize=True"),
        ({"base": "uniform"}, "base='uniform'"),
        ({"include": "nothing*"}, "nothing"),
    ],
)
def test_settings_that_mean_nothing_are_told(settings, told):
    with pytest.raises(flipout.ArgumentError, match=told):
        ZerothOrder(make(), **settings)


@pytest.mark.parametrize(
    ("returned", "error", "told"),
    [
        (lambda rows: torch.ones(()).double(), flipout.BatchError, "direction of its own"),
        (lambda rows: torch.ones(rows + 1), flipout.BatchError, "direction of its own"),
        (lambda rows: [1.0] * rows, flipout.BatchError, "returned list"),
        (lambda rows: torch.full((rows,), math.nan), flipout.NotFiniteError, "not finite"),
    ],
)
def test_losses_that_are_none_are_told(returned, error, told):
    zeroth = ZerothOrder(make())

    def wrong(module, batch):
        return returned(len(module(batch["x"])))

    with pytest.raises(error, match=told):
        zeroth.backward(wrong, data())
    with pytest.raises(flipout.BatchError, match="examples=N"):
        zeroth.backward(losses, {"x": torch.ones(3, WIDTH), "y": torch.ones(4, 2)})
