"""The variance of gradients of learnable scales, on a case that is known exactly.

For L = ½ wᵀ A w with A diagonal, w = w̄ + ΔW and ΔW = σ ε, the gradient of log σ_i is ΔW_i A_i (w̄_i + ΔW_i), so

    ĥ_i = A_i (ε_i² + w̄_i ε_i / σ),      Var(ĥ_i) = A_i² (Var ε² + w̄_i² / σ²),

with Var ε² = 2 of a Gaussian and 0 of a Rademacher base. Shared noise and flipout's ε² do not fall with N; the second part does
under flipout.
"""

import pytest
import torch
from torch import nn

import flipout
from flipout import ArgumentError
from flipout.variance import gradient_variance, variance_curve

CURVATURE = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
STD, N = 0.4, 8


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(MEAN.clone())

    def forward(self, x):
        return 0.5 * ((x + self.w).square() * CURVATURE).sum(-1)


def found(noise, estimators=("shared", "flipout", "independent"), of="curvature", draws=240):
    net = flipout.Perturbed(Bowl(), noise)
    batch = lambda n, generator: torch.zeros(n, 3, dtype=torch.float64)  # noqa: E731
    return gradient_variance(net, lambda net, x: net(x).mean(), batch, N, estimators, draws, of=of)


@pytest.mark.parametrize(
    ("noise", "square"),
    [(flipout.Gaussian(STD, learnable=True), 2.0), (flipout.Rademacher(STD, learnable=True), 0.0)],
    ids=["gaussian", "rademacher"],
)
def test_the_curvature_estimate_has_the_exact_variance(noise, square):
    base = float((CURVATURE.square() * square).sum())
    linear = float((CURVATURE * MEAN / STD).square().sum())
    exact = {"shared": base + linear, "flipout": base + linear / N, "independent": (base + linear) / N}
    for name, each in found(noise).items():
        assert abs(each.total.value - exact[name]) < 4 * each.total.standard_error, name


def test_scales_and_curvature_differ_by_the_square_of_the_scale():
    noise = flipout.Gaussian(STD, learnable=True)
    one, other = (found(noise, ["flipout"], of, draws=20)["flipout"].total.value for of in ("log_std", "curvature"))
    assert one == pytest.approx(other * STD**4)


def test_a_curve_of_curvature_goes_on_from_its_file(tmp_path):
    net = flipout.Perturbed(Bowl(), flipout.Gaussian(STD, learnable=True))
    arguments = (net, lambda net, x: net(x).mean(), lambda n, g: torch.randn(n, 3, generator=g, dtype=torch.float64), (1, 4))
    first = variance_curve(*arguments, draws=8, of="curvature", checkpoint=tmp_path / "c.json")
    assert variance_curve(*arguments, draws=8, of="curvature", checkpoint=tmp_path / "c.json").as_dict() == first.as_dict()
    with pytest.raises(ArgumentError):
        variance_curve(*arguments, draws=8, checkpoint=tmp_path / "c.json")


def test_refuses_what_has_no_scales_and_other_words():
    with pytest.raises(ArgumentError, match="no scales to learn"):
        found(flipout.Gaussian(STD), draws=4)
    with pytest.raises(ArgumentError, match="choose 'mean', 'log_std', 'curvature'"):
        found(flipout.Gaussian(STD, learnable=True), of="median", draws=4)
