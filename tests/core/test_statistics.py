"""Statistical laws: members have the noise's own law, are uncorrelated, and pool to the variance of a true weight perturbation.

Seeds are fixed and every judgement is a z-score against a known value, or between two samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cases import BY_NAME, CASES, Case
from cases.functions import CLOSED
from laws import EXACT, LISTED, Z_LIMIT, distance, worst, wrap, z_difference, z_mean
from torch import Tensor, nn

import flipout

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")  # torch itself says so of even kernels

NOISES: dict[str, flipout.Noise] = {
    "gaussian": flipout.Gaussian(0.3),
    "gaussian_learnable": flipout.Gaussian(0.3, learnable=True),
    "gaussian_relative": flipout.MultiplicativeGaussian(0.3),
    "rademacher": flipout.Rademacher(0.3),
    "dropconnect": flipout.DropConnect(0.5),
    "laplace": flipout.FromDistribution(torch.distributions.Laplace(0.0, 0.2)),
    "uniform": flipout.FromDistribution(torch.distributions.Uniform(-0.5, 0.5)),
}


#: Second moment and mean size of the perturbation (of its ratio to the mean, for relative noise).
MOMENTS = {
    "gaussian": (0.09, 0.3 * math.sqrt(2 / math.pi)),
    "gaussian_learnable": (0.09, 0.3 * math.sqrt(2 / math.pi)),
    "gaussian_relative": (0.09, 0.3 * math.sqrt(2 / math.pi)),
    "rademacher": (0.09, 0.3),
    "dropconnect": (1.0, 1.0),
    "laplace": (2 * 0.2**2, 0.2),
    "uniform": (0.5**2 / 3, 0.25),
}


class Kinds(nn.Module):
    """A parameter of every kind, large enough that its entries are a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(60, 70)
        self.kernel = nn.Conv2d(30, 20, 3)
        self.table = nn.Embedding(60, 70)
        self.vector = nn.Parameter(torch.zeros(4000))
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(0.5, 1.5).mul_(torch.randn_like(parameter).sign())


@pytest.mark.parametrize("estimator", ["flipout", "shared", "independent"])
@pytest.mark.parametrize("noise", NOISES)
def test_members_have_the_law_of_the_noise(noise: str, estimator: str) -> None:
    """The entries of one member's weight are independent draws of the noise: its mean, variance and mean size."""
    law, (second, size) = NOISES[noise], MOMENTS[noise]
    net = flipout.Perturbed(Kinds(), law, LISTED[estimator], generator=torch.Generator().manual_seed(3))
    means = dict(net.module.named_parameters())
    scores = []
    with net.hold(5) as draw, torch.no_grad():
        for n in (0, 4):
            for name, weight in draw.weights(n).items():
                unit = (weight - means[name]) / (means[name].abs() if law.relative else 1.0)
                square = unit.flatten().square()
                scores.append(z_mean(unit.flatten(), 0.0))
                if square.std() < 1e-9:  # ±std
                    assert torch.allclose(square, torch.full_like(square, second))
                else:
                    scores += [z_mean(square, second), z_mean(square.sqrt(), size)]
    assert worst(torch.stack(scores)) < Z_LIMIT


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_members_have_the_mean_and_variance_of_the_noise(rank: int) -> None:
    net = flipout.Perturbed(Kinds(), flipout.Gaussian(0.3), flipout.LowRank(rank), generator=torch.Generator().manual_seed(3))
    means = dict(net.module.named_parameters())
    averages: dict[str, list[Tensor]] = {name: [] for name in means}
    with net.hold(150) as draw, torch.no_grad():
        for n in range(150):
            for name, weight in draw.weights(n).items():
                unit = weight - means[name]
                averages[name].append(torch.stack([unit.mean(), unit.square().mean()]))
                assert unit.dim() < 2 or torch.linalg.matrix_rank(unit.flatten(1)) == rank
    expected = torch.tensor([0.0, 0.3**2], dtype=torch.float64)
    assert worst(torch.stack([z_mean(torch.stack(found), expected) for found in averages.values()])) < Z_LIMIT


@pytest.mark.parametrize("estimator", ["flipout", "independent", "low_rank"])
def test_members_are_uncorrelated(estimator: str) -> None:
    """The mean product of two members' perturbations vanishes, over entries and over pairs of members."""
    net = flipout.Perturbed(Kinds(), flipout.Gaussian(0.3), LISTED[estimator], generator=torch.Generator().manual_seed(4))
    means = dict(net.module.named_parameters())
    with net.hold(12) as draw, torch.no_grad():
        members = [draw.weights(n) for n in range(12)]
    products = {
        name: torch.stack([((a[name] - mean) * (b[name] - mean)).mean() for a, b in itertools.combinations(members, 2)])
        for name, mean in means.items()
    }
    for name, pairs in products.items():
        assert abs(z_mean(pairs, 0.0)) < Z_LIMIT, name


def test_members_of_a_shared_draw_are_equal() -> None:
    net = flipout.Perturbed(Kinds(), flipout.Gaussian(0.3), flipout.Shared())
    with net.hold(3) as draw:
        assert all(torch.equal(a, b) for a, b in zip(draw.weights(0).values(), draw.weights(2).values(), strict=True))


# --- outputs ----------------------------------------------------------------------------------------------------------


def _one_row(case: Case, copies: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat([x] * copies, case.batch_dim) for x in case.draw_inputs(1))


def _pool(case: Case, y: Tensor) -> Tensor:
    """Two numbers a row: the mean over all positions, and a fixed random projection."""
    rows = y.movedim(case.batch_dim, 0)
    rows = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    projection = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(8), dtype=y.dtype)
    return torch.stack([rows.mean(1), rows @ projection], 1)


def _theory(case: Case, std: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of the pooled output of one example, where the output is affine in independent weights."""
    module = case.build()
    wanted = [p for name, p in module.named_parameters() if name not in case.exclude]
    pooled = _pool(case, module(*case.draw_inputs(1)))[0]
    variance = [
        sum(
            g.square().sum() * std**2 for g in torch.autograd.grad(p, wanted, retain_graph=True, allow_unused=True) if g is not None
        )
        for p in pooled
    ]
    return pooled.detach(), torch.stack(variance)  # type: ignore[arg-type]


#: Draws of a law over draws, rows of a law over rows; members of one flipout draw share a base, those of Independent share nothing.
DRAWS, ROWS = 48, 1500
EVERY = [*CASES, *CLOSED]
every_case = pytest.mark.parametrize("case", EVERY, ids=str)


def _z_variance(samples: Tensor, expected: Tensor) -> Tensor:
    """z-score of the variance of Gaussian samples of mean 0 along axis 0, by Wilson and Hilferty's cube root (1931)."""
    n = samples.shape[0]
    known = expected > 0
    ratio = (samples.square().mean(0) / expected.clamp_min(1e-300))[..., known]
    return (ratio ** (1 / 3) - (1 - 2 / (9 * n))) / math.sqrt(2 / (9 * n))


def _outputs(case: Case, estimator: flipout.Estimator, draws: int, rows: int) -> Tensor:
    """Pooled outputs ``[draws, rows, 2]`` of one example, under fresh members in every row."""
    net = wrap(case, flipout.Gaussian(0.3), estimator)
    x = _one_row(case, rows)
    with net.sampling(), torch.no_grad():
        return torch.stack([_pool(case, net(*x)) for _ in range(draws)])


@every_case
def test_pooled_outputs_have_the_variance_of_a_weight_perturbation(case: Case) -> None:
    """Positions share their example's weights, so their noise does not average out; examples do not share, so theirs does.

    Where the output is affine its law is Gaussian with a known variance; else members drawn independently are the judge.
    """
    flipped = _outputs(case, flipout.Flipout(), DRAWS, 6)
    alone = _outputs(case, flipout.Independent(), 1, ROWS)[0]
    scores = []
    if case.affine and case.held_to("theory"):
        mean, variance = _theory(case, 0.3)
        shared = _outputs(case, flipout.Shared(), DRAWS // 2, 2) - mean
        assert distance(shared[:, 0], shared[:, 1]) <= EXACT
        flipped, alone = flipped - mean, alone - mean
        scores += [_z_variance(each, variance) for each in (flipped, alone, shared[:, 0])]
        total, squares = flipped.sum(1), flipped.square().sum(1)
        scores += [z_mean(squares / 6, variance), z_mean(total.square() - squares, 0.0), z_mean(alone[::2] * alone[1::2], 0.0)]
        if case.held_to("low rank"):
            factors = _outputs(case, flipout.LowRank(2), 1, ROWS)[0] - mean
            scores += [z_mean(factors, 0.0), z_mean(factors.square(), variance), z_mean(factors[::2] * factors[1::2], 0.0)]
    else:
        centre = alone.mean(0)
        for row in flipped.unbind(1):
            scores += [z_difference(row, alone), z_difference((row - centre).abs(), (alone - centre).abs())]
    assert worst(torch.cat([score.flatten() for score in scores])) < Z_LIMIT


@pytest.mark.parametrize("case", [case for case in CASES if case.local], ids=str)
def test_local_reparameterization_has_the_output_law(case: Case) -> None:
    """Mean and variance of pooled outputs, against theory where the output is affine, else against independent weights."""
    copies = 3000
    x = _one_row(case, copies)

    def sample(estimator: flipout.Estimator) -> Tensor:
        net = wrap(case, flipout.Gaussian(0.2), estimator)
        with net.sampling(), torch.no_grad():
            return _pool(case, net(*x))

    local = sample(flipout.LocalReparameterization())
    if case.affine:
        mean, variance = _theory(case, 0.2)
        scores = [z_mean(local, mean), z_mean((local - mean).square(), variance)]
    else:
        exact = sample(flipout.Independent())
        centre = exact.mean(0)
        scores = [z_difference(local, exact), z_difference((local - centre).square(), (exact - centre).square())]
    assert worst(torch.stack(scores)) < Z_LIMIT


@pytest.mark.parametrize("name", ["linear_3d", "embedding", "mul", "bilinear_3d"])
def test_signs_per_token_make_tokens_uncorrelated(name: str) -> None:
    """granularity="token": every row of an operation has the right variance and shares nothing with its neighbours."""
    case = BY_NAME[name]
    net = wrap(case, flipout.Gaussian(0.3), flipout.Flipout(granularity="token"))
    x = tuple(v[:, :1].expand(-1, 3, *v.shape[2:]).contiguous() for v in case.draw_inputs(2))
    exact = wrap(case, flipout.Gaussian(0.3), flipout.Independent())
    with net.sampling(), exact.sampling(), torch.no_grad():
        ours = torch.stack([net(*x).sum(-1) for _ in range(600)]) - net.module(*x).sum(-1)
        theirs = torch.stack([exact(*x).sum(-1) for _ in range(600)]) - net.module(*x).sum(-1)
    assert worst(z_mean(ours, 0.0)) < Z_LIMIT
    assert worst(z_difference(ours.square(), theirs.square())) < Z_LIMIT
    flat = ours.flatten(1)
    for a, b in itertools.combinations(range(flat.shape[1]), 2):
        assert abs(z_mean(flat[:, a] * flat[:, b], 0.0)) < Z_LIMIT
    assert z_mean(theirs[:, 0, 0] * theirs[:, 0, 1], 0.0) > Z_LIMIT  # an example's own tokens are one function


# --- gradients --------------------------------------------------------------------------------------------------------


def _gradients(case: Case, estimator: flipout.Estimator, draws: int, scale: Callable[[Tensor], Tensor]) -> Tensor:
    net = wrap(case, flipout.Gaussian(0.3, learnable=True), estimator)
    x = case.draw_inputs(6)
    found = []
    with net.sampling():
        for _ in range(draws):
            grads = torch.autograd.grad(scale(net(*x)), list(net.parameters()))
            found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found)


@pytest.mark.parametrize("estimator", ["flipout", "shared", "local"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "layer_norm_3d", "bag_max"])
def test_the_expected_gradient_is_the_independent_ones(name: str, estimator: str) -> None:
    """Of a loss that is not linear in the weights, for means and learnable scales."""
    case = BY_NAME[name]
    if estimator == "local" and not case.local:
        pytest.skip("refused")
    chosen = flipout.LocalReparameterization() if estimator == "local" else LISTED[estimator]

    def loss(y: Tensor) -> Tensor:
        return torch.tanh(y).square().mean()

    ours, theirs = (_gradients(case, e, 300, loss) for e in (chosen, flipout.Independent()))
    moving = theirs.var(0) > 1e-20  # entries that no row touches have no gradient in either
    assert torch.equal(moving, ours.var(0) > 1e-20)
    assert worst(z_difference(ours[:, moving], theirs[:, moving])) < Z_LIMIT
