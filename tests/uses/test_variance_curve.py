"""Laws of variance curves and of the components of Theorem 2, on nets whose α, β and γ are known in closed form."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flipout
from flipout.errors import ArgumentError, SaveError
from flipout.intervals import Estimate
from flipout.variance import (
    VarianceComponents,
    VarianceCurve,
    gradient_variance,
    suggest_batch_size,
    variance_components,
    variance_curve,
    without_replacement,
)

WIDTH, STD = 4, 1.0


def examples(n: int, generator: torch.Generator) -> Tensor:
    """Rows of unit variance."""
    return torch.randn(n, WIDTH, generator=generator)


def constant(n: int, generator: torch.Generator) -> Tensor:
    return torch.ones(n, WIDTH)


def half_square(net: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = 0.5 * net(x).square().sum(1).mean()
    return loss


def linear(noise: flipout.noise.Noise) -> flipout.Perturbed:
    """One output, mean weights of one: y = Σ_i w_i x_i, whose gradient for one example is y x (additive noise)."""
    module = nn.Linear(WIDTH, 1, bias=False)
    nn.init.ones_(module.weight)
    return flipout.Perturbed(module, noise)


def z_score(estimate: Estimate, truth: float) -> float:
    return (float(estimate) - truth) / estimate.standard_error


def test_components_of_constant_inputs_in_closed_form() -> None:
    """x = 1: G_i = W̄·1 + Σ_j ΔW_j for every i, so α = 4 Var(Σ ΔW) = 16 σ². Signs are s_j r with ΔW_j = ΔŴ_j s_j r:
    E[G | ΔŴ] is free of ΔŴ, hence γ = 0 and β = α."""
    net = linear(flipout.Gaussian(STD))
    found = variance_components(net, half_square, constant, draws=400, batch_size=8, seed=3)
    assert abs(z_score(found.alpha, 16.0)) < 4
    assert abs(z_score(found.beta, 16.0)) < 4
    assert abs(z_score(found.gamma, 0.0)) < 4


def test_components_under_relative_noise_in_closed_form() -> None:
    """Multiplicative noise, x = 1, W̄ = 1: G_i = y (1 + ε_i) with y = 4 + Σ ε_j. With signs u_j = r s_j, ε_j = ε̂_j u_j and
    E[G_i | ε̂] = E[(4 + Σ ε̂_j u_j)(1 + ε̂_i u_i)] = 4 + ε̂_i², whose variance is 2: γ = 4·2. All in all
    Var(G_i) = E[y²(1 + ε_i)²] - 25 = (16 + 3 + 1 + ... ) by moments below, and β = α - γ since x is constant."""
    # y = a + ε with a = 4 + the other three: E a = 4, E a² = 19; E[(a+ε)²(1+ε)²] = E a²·2 + 2 E a·2 + (1 + 3), see E ε⁴ = 3
    second = 19 * 2 + 2 * 4 * 2 + (1 + 3)
    alpha = 4 * (second - 25)
    net = linear(flipout.MultiplicativeGaussian(1.0))
    found = variance_components(net, half_square, constant, draws=2000, batch_size=16, repeats=40, seed=1)
    assert abs(z_score(found.alpha, alpha)) < 4
    assert abs(z_score(found.gamma, 8.0)) < 4
    assert abs(z_score(found.beta, alpha - 8.0)) < 4


def test_gamma_vanishes_where_the_base_has_one_size_only() -> None:
    """Under ±W̄ the base is itself nothing but signs, which the examples' own signs renew: flipout is independent noise."""
    net = linear(flipout.DropConnect(0.5))
    found = variance_components(net, half_square, examples, draws=400, batch_size=16, seed=2)
    assert abs(z_score(found.gamma, 0.0)) < 4
    assert found.beta.low > 0


@pytest.mark.parametrize("estimator", ["shared", "flipout", "independent"])
def test_predictions_meet_the_measured_curve(estimator: str) -> None:
    net = linear(flipout.MultiplicativeGaussian(1.0))
    found = variance_components(net, half_square, examples, draws=600, batch_size=32, seed=0)
    curve = variance_curve(net, half_square, examples, (1, 4, 32, 128), (estimator,), draws=400, seed=1)
    for size, measured in zip(curve.batch_sizes(estimator), curve.values(estimator), strict=True):
        predicted = found.predict(estimator, size)
        error = math.hypot(predicted.standard_error, measured.standard_error)
        assert abs(predicted - measured) / error < 4, (size, predicted, measured)


def test_curve_has_the_law_and_the_plateau() -> None:
    net = linear(flipout.Gaussian(STD))
    curve = variance_curve(
        net, half_square, constant, (1, 2, 8, 32, 128), draws={"shared": 300, "flipout": [400, 300, 300, 200, 200]}
    )
    assert abs(z_score(curve.slope("flipout"), -1.0)) < 4
    assert abs(z_score(curve.plateau("shared"), 16.0)) < 4
    assert abs(z_score(curve.plateau("flipout"), 0.0)) < 4
    assert abs(z_score(curve.slope("shared"), 0.0)) < 4
    assert curve.ratio("shared", "flipout", 128) == pytest.approx(128, rel=0.5)
    assert [each.draws for each in curve.points["flipout"]] == [400, 300, 300, 200, 200]


def test_curve_gives_the_numbers_of_single_measurements() -> None:
    net = linear(flipout.Gaussian(STD))
    curve = variance_curve(net, half_square, examples, (2, 6), draws=20, seed=5)
    for size in (2, 6):
        alone = gradient_variance(net, half_square, examples, batch_size=size, draws=20, seed=5)
        for name in ("shared", "flipout"):
            assert curve.at(name, size) == alone[name].total


def test_micro_batches_have_the_same_components() -> None:
    net = linear(flipout.MultiplicativeGaussian(1.0))
    whole = variance_components(net, half_square, examples, draws=400, batch_size=16, seed=0)
    pieces = variance_components(net, half_square, examples, draws=400, batch_size=16, micro_batch=4, seed=1)
    for name, found in whole.of().items():
        other = pieces.of()[name]
        assert abs(found - other) / math.hypot(found.standard_error, other.standard_error) < 4


def test_parts_and_groups() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 1))
    net = flipout.Perturbed(module, flipout.Gaussian(0.5))
    parts = {"top": ("0.weight", slice(0, 2)), "rest": ("0.weight", slice(2, 6))}
    found = gradient_variance(net, half_square, examples, 8, draws=12, parts=parts, by="module")["flipout"]
    assert found.of(["top", "rest"]) == pytest.approx(found.parameters["0.weight"])
    assert found.sizes["top"] == 2 * WIDTH
    assert found.total == pytest.approx(sum(found.parameters.values()))
    assert list(found.groups) == ["0", "2", "top", "rest"]
    assert found.groups["0"] == found.of(["0.weight", "0.bias"])
    components = variance_components(net, half_square, examples, draws=8, batch_size=8, parts=parts)
    assert components.of(["top", "rest"])["alpha"] == pytest.approx(components.of(["0.weight"])["alpha"])


def test_results_survive_json() -> None:
    net = linear(flipout.Gaussian(STD))
    curve = variance_curve(net, half_square, examples, (1, 4), draws=8)
    components = variance_components(net, half_square, examples, draws=8, batch_size=4)
    assert VarianceCurve.from_dict(json.loads(json.dumps(curve.as_dict()))) == curve
    assert VarianceComponents.from_dict(json.loads(json.dumps(components.as_dict()))) == components


def test_tables_and_figures() -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    net = linear(flipout.Gaussian(STD))
    curve = variance_curve(net, half_square, examples, (1, 4), draws=8)
    frame = curve.to_pandas(by="total")
    assert list(frame["batch_size"]) == [1, 4, 1, 4]
    assert frame["variance"][2] == curve.at("flipout", 1)
    components = variance_components(net, half_square, examples, draws=8, batch_size=4)
    assert list(components.to_pandas()["component"]) == ["alpha", "beta", "gamma"]
    axes = curve.plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["shared", "flipout"]
    predicted = components.plot((1, 4, 16))
    assert "shared, predicted" in [text.get_text() for text in predicted.get_legend().get_texts()]
    assert curve.plot(axes=predicted) is predicted
    bars = gradient_variance(net, half_square, examples, 4, draws=8, by="parameter").plot()
    assert [text.get_text() for text in bars.get_xticklabels()] == ["weight"]


def test_suggested_sizes_have_the_efficiency_asked_for() -> None:
    net = linear(flipout.MultiplicativeGaussian(1.0))
    found = suggest_batch_size(net, half_square, examples, draws=200, batch_size=32, efficiency=0.8)
    components = found.components
    for name, size in (("shared", found.shared), ("flipout", found.flipout)):
        alpha, gamma, beta = components.alpha.value, components.gamma.value, components.beta.value
        plateau = gamma + (beta if name == "shared" else 0)
        variance = alpha / size.value + (1 - 1 / size.value) * plateau
        assert alpha / variance == pytest.approx(0.8 * size.value)
    assert found.shared < found.flipout
    assert "worth 80 %" in str(found)


def test_a_plateau_not_seen_is_no_limit() -> None:
    blocks = {"w": ((10.0, 1.0, -1.5), (10.0, 1.0, -1.4))}
    found = suggest_batch_size(components=VarianceComponents(blocks, {"w": 1}, 8, 8))
    assert math.isinf(found.flipout.value)
    assert "any size" in str(found)


@pytest.mark.parametrize("what", ["curve", "components"])
def test_a_checkpoint_goes_on_to_the_same_numbers(tmp_path: Path, what: str) -> None:
    net = linear(flipout.Gaussian(STD))
    calls = 0

    def stop_at(limit: int):
        def on_draw() -> None:
            nonlocal calls
            calls += 1
            if calls == limit:
                raise KeyboardInterrupt

        return on_draw

    def run(checkpoint: Path | None, limit: int = 10**9):
        options = {"repeats": 4, "checkpoint": checkpoint, "on_draw": stop_at(limit)}
        if what == "curve":
            return variance_curve(net, half_square, examples, (1, 4), draws=12, **options)
        return variance_components(net, half_square, examples, draws=24, batch_size=4, **options)

    path = tmp_path / "blocks.json"
    with pytest.raises(KeyboardInterrupt):
        run(path, 29)
    saved = json.loads(path.read_text())["blocks"]
    assert 0 < sum(map(len, saved.values())) < 16
    calls = 0
    assert run(path) == run(None)
    assert calls == 2 * 48


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from test_variance_curve import *
net = linear(flipout.Gaussian(STD))
options = dict(draws=60, repeats=10, checkpoint={path!r}, on_draw=lambda: time.sleep({pause}))
curve = variance_curve(net, half_square, examples, (1, 4, 16), **options)
print(repr(float(curve.at("flipout", 16))))
"""


def test_a_killed_measurement_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path), pause=0.005)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not path.exists() or path.stat().st_size < 700):
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < sum(map(len, json.loads(path.read_text())["blocks"].values())) < 60
    again = subprocess.run([sys.executable, "-c", script.replace("0.005", "0")], check=True, stdout=subprocess.PIPE, text=True)
    whole = variance_curve(linear(flipout.Gaussian(STD)), half_square, examples, (1, 4, 16), draws=60, repeats=10)
    assert float(again.stdout) == float(whole.at("flipout", 16))


def test_a_checkpoint_of_another_question_is_refused(tmp_path: Path) -> None:
    net = linear(flipout.Gaussian(STD))
    path = tmp_path / "blocks.json"
    variance_curve(net, half_square, examples, (1, 4), draws=4, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ArgumentError, match=r"of another measurement \(seed was 0, is 1\); name another file"):
        variance_curve(net, half_square, examples, (1, 4), draws=4, seed=1, checkpoint=path)
    with torch.no_grad():
        net.module.weight += 1
    with pytest.raises(ArgumentError, match="weights was"):
        variance_curve(net, half_square, examples, (1, 4), draws=4, checkpoint=path)
    assert path.read_bytes() == before


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_variance_curve import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
net = linear(flipout.Gaussian(STD))
def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200))
limit()
try:
    variance_curve(net, half_square, examples, tuple(range(1, 30)), draws=8, checkpoint={path!r})
except SaveError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    script = FULL.format(tests=str(Path(__file__).parent), path=str(path))
    printed = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "could not be written" in printed
    assert "the version saved before is kept" in printed
    assert json.loads(path.read_text())["blocks"]


def test_a_loss_that_is_no_mean_is_refused() -> None:
    net = linear(flipout.Gaussian(STD))
    with pytest.raises(ArgumentError, match="the same examples put twice: it is not their mean"):
        gradient_variance(net, lambda net, x: net(x).square().sum(), examples, draws=4)
    assert net.training


def test_more_distinct_examples_than_there_are_is_refused() -> None:
    net = linear(flipout.Gaussian(STD))
    sample_batch = without_replacement(torch.randn(16, WIDTH))
    with pytest.raises(ArgumentError, match="32 distinct examples was asked of a data set of 16"):
        variance_curve(net, lambda net, batch: half_square(net, batch[0]), sample_batch, (8, 32), draws=4)
    with pytest.raises(ArgumentError, match=r"tensors of \[3, 2\] rows"):
        without_replacement(torch.zeros(3), torch.zeros(2))


def test_what_does_not_vary_is_refused() -> None:
    net = linear(flipout.Gaussian(STD))

    def still(net: flipout.Perturbed, x: Tensor) -> Tensor:
        return half_square(net.module, x)

    with pytest.raises(ArgumentError, match="are the same: neither noise nor batches vary"):
        variance_curve(net, still, constant, (1, 4), draws=4)
    with pytest.raises(ArgumentError, match="does not vary"):
        variance_components(net, still, constant, draws=4, batch_size=4)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    net = linear(flipout.Gaussian(STD))
    with pytest.raises(ArgumentError, match="gradient of 'weight' is not finite"):
        variance_components(net, lambda net, x: half_square(net, x) / 0, examples, draws=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": ()}, "at least one size"),
        ({"batch_sizes": (4, 4)}, "each once"),
        ({"draws": 1}, "draws=1"),
        ({"draws": {"shared": 4}}, "no entry for 'flipout'"),
        ({"draws": {"shared": 4, "flipout": 4, "low_rank": 4}}, "not among the estimators"),
        ({"draws": {"shared": [4], "flipout": 4}}, "1 numbers for 2 batch sizes"),
        ({"parts": {"x": ("nothing", slice(0, 1))}}, "part 'x' of 'nothing'"),
        ({"parts": {"x": ("weight", slice(7, 9))}}, "has no rows"),
    ],
)
def test_wrong_arguments_are_told(options: dict, message: str) -> None:
    net = linear(flipout.Gaussian(STD))
    with pytest.raises(ArgumentError, match=message):
        variance_curve(net, half_square, examples, **{"batch_sizes": (1, 4), "draws": 4, **options})


def test_what_was_not_measured_is_told() -> None:
    net = linear(flipout.Gaussian(STD))
    curve = variance_curve(net, half_square, examples, (1, 4), draws=4)
    with pytest.raises(ArgumentError, match="'low_rank' was not measured"):
        curve.slope("low_rank")
    with pytest.raises(ArgumentError, match="not measured at N = 2, but at 1, 4"):
        curve.at("shared", 2)
    with pytest.raises(ArgumentError, match="no parameter 'bias': there are weight"):
        curve.slope("shared", ["bias"])
    with pytest.raises(ArgumentError, match="by='layer'"):
        curve.to_pandas(by="layer")
    components = variance_components(net, half_square, examples, draws=4, batch_size=2)
    with pytest.raises(ArgumentError, match="Theorem 2 says nothing of 'low_rank'"):
        components.predict("low_rank", 4)
    with pytest.raises(ArgumentError, match="efficiency=1"):
        suggest_batch_size(components=components, efficiency=1)
    with pytest.raises(ArgumentError, match="or components"):
        suggest_batch_size()
    assert issubclass(SaveError, OSError)
