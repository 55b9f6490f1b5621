"""Laws of the instrument, on a case whose variance is known exactly.

For y_n = w_n · x_n, L = y²/2, x ~ N(0, I_d) and w_n = w̄ + δ_n with δ ~ N(0, σ² I_d), the gradient for an example is G = x y, and

    α = (d + 2)(‖w̄‖² + dσ²) - ‖w̄‖²,      β + γ = dσ² under shared noise,      γ = 0 under flipout.
"""

import copy
import json
import math
import pickle

import pytest
import torch
from scipy import stats
from torch import nn

import flipout
from flipout.gradients import gradient, micro_batches, rows_at_once
from flipout.intervals import Estimate, estimate_mean, log_log_slope, ratio, t_quantile
from flipout.moments import Moments
from flipout.streams import stream
from flipout.variance import ESTIMATORS, gradient_variance, named_estimators
from flipout_experiments.paper.variance.independent_members import independent_curve

D, STD = 4, 0.7
MEAN = torch.tensor([[0.5, -1.0, 0.3, 0.2]], dtype=torch.float64)
ALPHA = (D + 2) * (MEAN.square().sum().item() + D * STD**2) - MEAN.square().sum().item()
BETA = D * STD**2


def linear_net(estimator=flipout.Flipout()):  # noqa: B008
    layer = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(MEAN)
    return flipout.Perturbed(layer, flipout.Gaussian(STD), estimator)


def sample_batch(n, generator):
    return torch.randn(n, D, generator=generator, dtype=torch.float64)


def loss_fn(net, x):
    return net(x).square().mean() / 2


def measure(n=16, estimators=("flipout",), draws=200, **options):
    return gradient_variance(linear_net(), loss_fn, sample_batch, n, estimators, draws, **options)


def z_score(estimate, exact):
    return (estimate.value - exact) / estimate.standard_error


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("n", [1, 8])
def test_equals_the_exact_variance(name, n):
    exact = ALPHA / n + (BETA * (n - 1) / n if name == "shared" else 0.0)
    assert abs(z_score(measure(n, [name])[name].total, exact)) < 4


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_do_not_change_the_law(name, micro_batch):
    n = 6
    exact = ALPHA / n + (BETA * (n - 1) / n if name == "shared" else 0.0)
    assert abs(z_score(measure(n, [name], micro_batch=micro_batch)[name].total, exact)) < 4


def test_flipout_falls_as_one_over_n_and_shared_levels_off():
    sizes = (1, 4, 16, 64, 256)
    curves = {name: [measure(n, [name], draws=150)[name].total for n in sizes] for name in ("flipout", "shared")}
    slope = log_log_slope(sizes, curves["flipout"])
    assert abs(z_score(slope, -1.0)) < 4
    assert slope.high - slope.low < 0.15
    assert abs(z_score(curves["shared"][-1], BETA + (ALPHA - BETA) / 256)) < 4
    assert ratio(curves["shared"][-1], curves["flipout"][-1]).low > 10


@pytest.mark.parametrize("draws", [8, 24])
def test_intervals_cover_the_exact_variance_as_often_as_they_say(draws):
    runs, n = 100, 64  # the mean of 64 examples is close to Gaussian, as t-intervals suppose
    found = [measure(n, draws=draws, seed=seed)["flipout"].total for seed in range(runs)]
    covered = sum(estimate.low <= ALPHA / n <= estimate.high for estimate in found)
    assert abs(covered - 0.9 * runs) / math.sqrt(0.09 * runs) < 4


@pytest.mark.parametrize(
    ("estimator", "alike", "mirrored"),
    [(flipout.Shared(), True, True), (flipout.Flipout(), False, True), (flipout.Independent(), False, False)],
)
def test_micro_batches_share_what_a_batch_shares(estimator, alike, mirrored):
    net = flipout.Perturbed(nn.Linear(1, 1, bias=False), flipout.Gaussian(1.0), estimator)
    with torch.no_grad():
        outputs = [net(torch.ones(8, 1)) for _ in micro_batches(net, 6, 8, stream(0))]
    deltas = torch.cat(outputs).flatten() - net.module.weight.detach().flatten()
    assert (deltas.unique().numel() == 1) is alike
    assert torch.allclose(deltas.abs(), deltas.abs()[0]) is mirrored
    if mirrored and not alike:
        assert len({tuple(part.flatten().tolist()) for part in outputs}) == 6  # fresh signs each time


def test_a_micro_batched_gradient_is_the_gradient_of_the_whole_batch_without_noise():
    net = linear_net()
    small = flipout.Perturbed(net.module, flipout.Gaussian(1e-12))
    x = sample_batch(12, stream(0, 5))
    whole = gradient(small, loss_fn, sample_batch, 12, 12, 0, (5,))["weight"]
    parts = gradient(small, loss_fn, sample_batch, 12, 4, 0, (5,))["weight"]
    loss_fn(net.module, x).backward()
    torch.testing.assert_close(whole, net.module.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)  # the stream of batches does not depend on the cut


def test_independent_curve_has_the_law_of_independent_noise():
    for point in independent_curve(linear_net(), loss_fn, sample_batch, (1, 4, 32), pairs=20):
        assert abs(z_score(point.total, ALPHA / point.batch_size)) < 4
        assert point.draws == 20 * min(32, 64 // point.batch_size)


def test_independent_curve_does_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    one = independent_curve(linear_net(), loss_fn, sample_batch, (1, 4), pairs=3)
    torch.set_num_threads(3)
    three = independent_curve(linear_net(), loss_fn, sample_batch, (1, 4), pairs=3)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)
    assert [point.blocks for point in one] == [point.blocks for point in three]


@pytest.mark.parametrize("sizes", [(4, 6), (4, 2), ()])
def test_independent_curve_refuses_sizes_that_do_not_nest(sizes):
    with pytest.raises(flipout.ArgumentError, match="multiple"):
        independent_curve(linear_net(), loss_fn, sample_batch, sizes)


def test_same_seed_same_numbers_whatever_else_is_measured():
    alone = measure(draws=6, seed=3)["flipout"]
    among = measure(draws=6, seed=3, estimators=("shared", "flipout"))["flipout"]
    assert alone == among
    assert alone.blocks != measure(draws=6, seed=4)["flipout"].blocks


def test_leaves_the_module_and_the_global_random_state_alone():
    net = linear_net(flipout.Independent())
    net.module.weight.grad = torch.full_like(MEAN, 7.0)
    state, weight = torch.get_rng_state(), net.module.weight.detach().clone()
    calls = []
    gradient_variance(net.eval(), loss_fn, sample_batch, 4, draws=4, on_draw=lambda: calls.append(None))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.module.weight.grad, torch.full_like(MEAN, 7.0))
    assert torch.equal(net.module.weight, weight)
    assert net.estimator == flipout.Independent()
    assert not net.training
    assert len(calls) == 8


def test_restores_the_estimator_after_an_error():
    net = linear_net()
    with pytest.raises(ZeroDivisionError):
        gradient_variance(net, lambda net, x: 1 / 0, sample_batch, 4, ["shared"], 4)
    assert net.estimator == flipout.Flipout()
    assert torch.equal(net.eval()(torch.ones(1, D, dtype=torch.float64)), net.module(torch.ones(1, D, dtype=torch.float64)))


def test_parameters_add_up_and_frozen_ones_are_left_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    net = flipout.Perturbed(module, flipout.Gaussian(0.3), include="*weight")

    def batch(n, generator):
        return torch.randn(n, 3, generator=generator)

    found = gradient_variance(net, loss_fn, batch, 8, ["flipout"], 20)["flipout"]
    assert list(found.parameters) == ["0.weight", "2.weight", "2.bias"]
    assert sum(map(float, found.parameters.values())) == pytest.approx(float(found.total))
    assert float(found.of(["2.weight", "2.bias"])) == pytest.approx(
        sum(float(found.parameters[f"2.{p}"]) for p in ("weight", "bias"))
    )
    assert found.sizes == {"0.weight": 12, "2.weight": 8, "2.bias": 2}
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["parameters"]["2.bias"]["entries"] == 2


def test_a_parameter_without_a_gradient_has_no_variance():
    module = nn.ModuleDict({"used": nn.Linear(D, 1), "idle": nn.Linear(2, 1)})
    module.forward = lambda x: module["used"](x)
    net = flipout.Perturbed(module.double(), flipout.Gaussian(0.3), unmet="ignore")
    found = gradient_variance(net, loss_fn, sample_batch, 4, ["flipout"], 4)["flipout"].parameters
    assert found["idle.weight"].value == 0.0 < found["used.weight"].value


def test_one_block_has_no_interval():
    total = measure(draws=3, repeats=1)["flipout"].total
    assert (total.low, total.high) == (0.0, math.inf)
    assert total.as_dict()["high"] is None


def test_ratio_of_estimators():
    found = measure(64, ("shared", "flipout"), draws=100)
    exact = (ALPHA / 64 + BETA * 63 / 64) / (ALPHA / 64)
    assert (
        abs(math.log(found.ratio("shared", "flipout").value / exact)) < 4 * found.ratio("shared", "flipout").standard_error / exact
    )
    assert set(found) == {"shared", "flipout"}
    assert set(found.as_dict()) == set(found)
    assert "shared=" in repr(found)


@pytest.mark.parametrize(("n", "micro", "rows"), [(12, None, 12), (12, 5, 4), (12, 100, 12), (7, 3, 1)])
def test_rows_at_once(n, micro, rows):
    assert rows_at_once(linear_net(), n, micro) == rows


def test_dense_members_are_bounded_in_memory():
    net = flipout.Perturbed(nn.Linear(2000, 2000, device="meta"), flipout.Gaussian(1.0), flipout.Independent())
    assert rows_at_once(net, 64, None) == 8


def test_estimators_by_name_and_by_instance():
    token = flipout.Flipout(granularity="token")
    found = named_estimators(["shared", token, flipout.Independent()])
    assert list(found) == ["shared", repr(token), "independent"]
    assert named_estimators("flipout") == {"flipout": flipout.Flipout()}


def test_token_signs_share_the_base_over_micro_batches():
    token = flipout.Flipout(granularity="token")
    exact = ALPHA / 12
    assert abs(z_score(measure(12, [token], micro_batch=4)[repr(token)].total, exact)) < 4


def test_signs_per_step_cannot_be_micro_batched():
    with pytest.raises(flipout.ArgumentError, match="leave micro_batch out"):
        measure(8, [flipout.Flipout(per_step=True)], draws=4, micro_batch=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 1}, "draws=1: expected an integer of at least 2"),
        ({"n": 0}, "batch_size=0"),
        ({"n": 2.0}, r"batch_size=2\.0"),
        ({"repeats": 3, "draws": 4}, "do not give 3 blocks"),
        ({"repeats": 0}, "repeats=0"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"confidence": 1.0}, r"confidence=1\.0"),
        ({"estimators": ("flip",)}, "unknown estimator 'flip': choose among shared, flipout"),
        ({"estimators": ("shared", flipout.Shared())}, "'shared' is given twice"),
        ({"estimators": ()}, "no estimator given"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(flipout.ArgumentError, match=message):
        measure(**{"draws": 4, **options})["flipout"].total  # noqa: B018


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda net, x: net(x).square(), r"a tensor of shape \(4, 1\); expected the mean loss"),
        (lambda net, x: 1.0, "returned float"),
        (lambda net, x: net(x).detach().mean(), "does not depend on a parameter"),
        (lambda net, x: net(x).mean() * math.nan, "gradient of 'weight' is not finite"),
    ],
)
def test_wrong_losses(loss, message):
    with pytest.raises(flipout.ArgumentError, match=message):
        gradient_variance(linear_net(), loss, sample_batch, 4, draws=4)


def test_wrong_nets():
    with pytest.raises(flipout.ArgumentError, match=r"expected a flipout\.Perturbed, got Linear"):
        gradient_variance(nn.Linear(D, 1), loss_fn, sample_batch)
    net = linear_net()
    net.module.requires_grad_(False)
    with pytest.raises(flipout.ArgumentError, match=r"requires a gradient|does not depend"):
        gradient_variance(net, loss_fn, sample_batch, 4, draws=4)


def test_an_estimator_that_cannot_serve_the_noise():
    net = flipout.Perturbed(nn.Linear(D, 1).double(), flipout.DropConnect(0.3), flipout.Shared())
    with pytest.raises(flipout.UnsupportedNoiseError, match="symmetric"):
        gradient_variance(net, loss_fn, sample_batch, 4, draws=4)


def test_streaming_moments_equal_the_two_pass_variance():
    drawn = torch.randn(17, 3, 5, dtype=torch.float64, generator=stream(1)) + 100
    moments = Moments()
    for g in drawn:
        moments.add({"w": g})
    assert moments.variance()["w"] == pytest.approx(drawn.var(0).sum().item(), rel=1e-12)
    torch.testing.assert_close(moments.mean["w"], drawn.mean(0))


def test_moments_need_two_gradients():
    with pytest.raises(flipout.ArgumentError, match="at least 2 gradients, got 0"):
        Moments().variance()


@pytest.mark.parametrize("degrees", [1, 2, 3.7, 9, 49, 1e4, 1e6])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.999])
def test_t_quantile_equals_scipy(confidence, degrees):
    assert t_quantile(confidence, degrees) == pytest.approx(stats.t.ppf((1 + confidence) / 2, degrees), rel=1e-4)


def test_estimates_refuse_what_has_no_logarithm_or_no_slope():
    zero, one = Estimate(0.0, 0.0, 0.0, 0.0, 3), estimate_mean([1.0, 1.1])
    with pytest.raises(flipout.ArgumentError, match=r"logarithm of 0\.0"):
        ratio(one, zero)
    with pytest.raises(flipout.ArgumentError, match="two different sizes"):
        log_log_slope([4, 4], [one, one])


def test_an_estimate_is_a_float_with_an_interval():
    estimate = Estimate(2.0, 1.0, math.inf, 0.5, 3)
    assert estimate / 4 == 0.5
    assert type(estimate.value) is float
    for copied in (pickle.loads(pickle.dumps(estimate)), copy.deepcopy(estimate)):
        assert repr(copied) == repr(estimate) == "Estimate(value=2.0, low=1.0, high=inf, standard_error=0.5, degrees=3)"


def test_a_slope_through_a_point_without_interval_has_none():
    slope = log_log_slope([1, 2], [estimate_mean([4.0]), estimate_mean([1.0, 3.0])])
    assert slope.value == pytest.approx(-1.0)
    assert slope.high == math.inf
    assert ratio(estimate_mean([4.0]), estimate_mean([1.0, 3.0])).high == math.inf
