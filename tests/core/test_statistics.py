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
from laws import LISTED, Z_LIMIT, worst, wrap, z_difference, z_mean
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


POOLED = [
    "linear", "linear_3d", "linear_batch_second", "linear_folded", "addmm_scaled", "matmul_left_3d", "matvec_left", "stack_right",
    "bilinear_3d", "conv1d_stride", "conv2d", "conv2d_stride_padding_dilation", "conv2d_same", "conv2d_reflect", "conv2d_groups",
    "conv2d_depthwise", "conv3d", "conv_transpose1d_output_padding", "conv_transpose2d_all", "embedding", "bag_mean", "bag_offsets",
    "positions", "class_token", "layer_norm_3d", "group_norm", "batch_norm2d", "prelu_channels", "mul", "scalar_mul",
    "masked_kernel", "reshape_mixed", "columns_step", "cat_columns",
]  # fmt: skip


@pytest.mark.parametrize("estimator", ["flipout", "shared", "independent", "low_rank"])
@pytest.mark.parametrize("name", POOLED)
def test_pooled_outputs_have_the_variance_of_a_weight_perturbation(name: str, estimator: str) -> None:
    """Positions share their example's weights, so their noise does not average out; examples do not share, so theirs does."""
    case = BY_NAME[name]
    mean, variance = _theory(case, 0.3)
    net = wrap(case, flipout.Gaussian(0.3), LISTED[estimator])
    x = _one_row(case, 6)
    spreads, products = [], []
    with net.sampling(), torch.no_grad():
        for _ in range(150):
            deviation = _pool(case, net(*x)) - mean
            total = deviation.sum(0)
            spreads.append(deviation.square().mean(0))
            products.append((total.square() - deviation.square().sum(0)) / 30)
    together = variance if estimator == "shared" else torch.zeros_like(variance)
    assert worst(z_mean(torch.stack(spreads), variance)) < Z_LIMIT
    assert worst(z_mean(torch.stack(products), together)) < Z_LIMIT


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
