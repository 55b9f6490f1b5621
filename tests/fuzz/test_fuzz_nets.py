"""Any layer under any noise, estimator, dtype and number of rows: what its members' dense weights give, or a clear error."""

import warnings
from fnmatch import fnmatchcase

import pytest
import torch
from clear import attempt, close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Gumbel, Laplace, Normal, StudentT, Uniform

import flipout
from flipout.reference import loop_forward
from flipout.signs import draw_bits, draw_signs, pack, packed_size, unpack

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class First(nn.Module):
    """A recurrent layer's outputs alone."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@st.composite
def layers(draw):
    """A module, and a function from a number of rows to its input."""
    width, out = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(("linear", "sequence", "conv", "transposed", "embedding", "norm", "recurrent", "deep", "bilinear")))
    bias = draw(st.booleans())
    if kind == "linear":
        return nn.Linear(width, out, bias), lambda n: torch.randn(n, width)
    if kind == "sequence":
        return nn.Linear(width, out, bias), lambda n: torch.randn(n, 3, width)
    if kind in ("conv", "transposed"):
        dims, groups = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2)))
        options = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1)), "dilation": draw(st.integers(1, 2))}
        name = ("ConvTranspose" if kind == "transposed" else "Conv") + f"{dims}d"
        layer = getattr(nn, name)(2 * width, 2 * out, draw(st.integers(1, 2)), groups=groups, bias=bias, **options)
        return layer, lambda n: torch.randn(n, 2 * width, *[5] * dims)
    if kind == "embedding":
        return nn.Embedding(7, width), lambda n: torch.randint(7, (n, 3))
    if kind == "norm":
        return nn.LayerNorm(width + 1), lambda n: torch.randn(n, 3, width + 1)
    if kind == "recurrent":
        layer = draw(st.sampled_from((nn.LSTM, nn.GRU, nn.RNN)))
        options = {"num_layers": draw(st.integers(1, 2)), "bidirectional": draw(st.booleans()), "bias": bias}
        return First(layer(width, out, batch_first=True, **options)), lambda n: torch.randn(n, 3, width)
    if kind == "bilinear":
        return nn.Bilinear(width, width, out, bias), lambda n: (torch.randn(n, width), torch.randn(n, width))
    return nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, out, bias)), lambda n: torch.randn(n, width)


def scales():
    shapes = st.lists(st.integers(1, 3), max_size=4)
    return st.one_of(
        st.floats(1e-3, 2.0), st.sampled_from((0.0, -1.0, float("nan"), float("inf"), True, "1", None)),
        shapes.map(lambda shape: torch.full(shape, 0.3)),
    )  # fmt: skip


@st.composite
def noises(draw):
    """A call that makes a noise, good or bad."""
    kind = draw(st.sampled_from(("gaussian", "rademacher", "multiplicative", "dropconnect", "distribution")))
    std, relative, learnable = draw(scales()), draw(st.booleans()), draw(st.booleans())
    if kind == "dropconnect":
        p = draw(st.sampled_from((0.5, 0.5, 0.2, 0.0, 1.0, -1, "x")))
        return lambda: flipout.DropConnect(p)
    if kind == "distribution":
        law = draw(st.sampled_from((
            Laplace(0.0, 1.0), Uniform(-1.0, 1.0), Normal(0.5, 1.0), Gumbel(0.0, 1.0), StudentT(4.0), Normal(torch.zeros(3), 1.0),
        )))  # fmt: skip
        return lambda: flipout.FromDistribution(law, relative=relative, learnable=learnable)
    noise = {"gaussian": flipout.Gaussian, "rademacher": flipout.Rademacher, "multiplicative": flipout.MultiplicativeGaussian}[kind]
    return lambda: noise(std, learnable=learnable) if kind == "multiplicative" else noise(std, relative, learnable)


ESTIMATORS = st.sampled_from((
    flipout.Flipout(), flipout.Flipout(), flipout.Shared(), flipout.Independent(), flipout.LowRank(1), flipout.LowRank(3),
    flipout.Flipout(granularity="token"), flipout.Flipout(per_step=True), flipout.LocalReparameterization(),
))  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@settings(max_examples=260)
@given(layers(), noises(), ESTIMATORS, st.sampled_from(list(TOLERANCE)), st.integers(0, 5), st.integers(0, 2), st.integers(0, 9))
def test_a_perturbed_module_is_its_members_or_refuses(layer, noise, estimator, dtype, members, blocks, seed):
    torch.manual_seed(seed)
    module, draw_input = layer
    module = module.to(dtype)
    made = attempt(noise)
    net = (
        None if made is None else attempt(lambda: flipout.Perturbed(module, made, estimator, fallback="loop" if seed % 2 else None))
    )
    if net is None:
        return
    x = draw_input(blocks * members + (seed == 9))
    x = tuple(each.to(dtype) if each.is_floating_point() else each for each in (x if isinstance(x, tuple) else (x,)))
    assert torch.equal(net.eval()(*x), module(*x))  # the means, exactly

    def held():
        with net.hold(members, torch.Generator().manual_seed(seed)) as draw, torch.no_grad():
            y = net(*x)
            return y, loop_forward(module, draw, *x) if estimator.has_members else None

    found = attempt(held)
    if found is None:
        return
    y, expected = found
    plain = module(*x)
    assert y.shape == plain.shape
    assert y.dtype == plain.dtype
    assert bool(y.isfinite().all())
    if expected is not None:
        assert close(y, expected, TOLERANCE[dtype])


@settings(max_examples=60)
@given(
    layers(), st.sampled_from((flipout.Flipout(), flipout.Independent(), flipout.LowRank(2))),
    st.lists(st.one_of(st.integers(-1, 4), st.sampled_from((1.5, "0"))), max_size=3), st.integers(-1, 5), st.integers(0, 9),
)  # fmt: skip
def test_a_draw_s_members_sums_and_fresh_signs(layer, estimator, fresh, count, seed):
    torch.manual_seed(seed)
    module = layer[0].double()
    net = attempt(lambda: flipout.Perturbed(module, flipout.Gaussian(0.3), estimator))
    if net is None:
        return
    means = {name: parameter.detach() for name, parameter in module.named_parameters()}
    with net.hold(4, torch.Generator().manual_seed(seed)) as draw:
        before = [draw.weights(n) for n in range(4)]
        good = len(set(fresh)) == len(fresh) and all(isinstance(n, int) and 0 <= n < 4 for n in fresh)
        done = attempt(lambda: draw.resample(fresh) or True)
        assert bool(done) is good
        after = [{name: w.detach() for name, w in draw.weights(n).items()} for n in range(4)]
        kept = [n for n in range(4) if not good or n not in fresh]
        assert all(torch.equal(before[n][name], after[n][name]) for n in kept for name in means)
        f = torch.randn(max(count, 0), dtype=torch.float64)
        sums = attempt(lambda: draw.weighted_sum(f))
        assert (sums is not None) is (count == 4)
        for name, found in (sums or {}).items():
            expected = sum(f[n] * (after[n][name] - means[name]) for n in range(4))
            assert close(found, expected.expand_as(found), 1e-10)
        for n in {-1, 4, *[n for n in fresh if not isinstance(n, int)]}:
            assert attempt(lambda n=n: draw.weights(n)) is None
            assert attempt(lambda n=n: draw.module(n)) is None


NAMES = st.lists(st.text("ab*?.0weight[]!", min_size=1, max_size=8), max_size=2)


@settings(max_examples=120)
@given(NAMES, NAMES, st.booleans())
def test_patterns_choose_what_fnmatch_says(include, exclude, single):
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2)))
    names = [name for name, _ in module.named_parameters()]
    wanted = include[0] if single and include else include
    net = attempt(lambda: flipout.Perturbed(module, flipout.Gaussian(0.1), include=wanted, exclude=exclude))
    patterns = include[:1] if single and include else include
    expected = [n for n in names if any(fnmatchcase(n, p) for p in patterns) and not any(fnmatchcase(n, p) for p in exclude)]
    idle = [p for p in (*patterns, *exclude) if p != "*" and not any(fnmatchcase(n, p) for n in names)]
    assert (net is not None) is (bool(expected) and not idle)
    if net is not None:
        assert list(net.noises) == expected


@given(
    st.integers(0, 4), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.sampled_from(list(TOLERANCE)), st.integers(0, 99)
)
def test_signs_are_bits_and_bits_signs(rows, sizes, dtype, seed):
    cpu = torch.device("cpu")
    bits = draw_bits(rows, sizes, generator=torch.Generator().manual_seed(seed), device=cpu)
    signs = draw_signs(rows, sizes, generator=torch.Generator().manual_seed(seed), device=cpu, dtype=dtype)
    for packed, drawn, size in zip(bits, signs, sizes, strict=True):
        assert packed.shape == (rows, packed_size(size))
        for each in (unpack(packed, size, dtype), drawn):
            assert each.shape == (rows, size)
            assert bool((each.abs() == 1).all())
            assert torch.equal(unpack(pack(each), size, dtype), each)
        by_hand = [[1.0 if packed[i, j // 8] >> (j % 8) & 1 else -1.0 for j in range(size)] for i in range(rows)]
        assert torch.equal(unpack(packed, size, dtype), torch.tensor(by_hand, dtype=dtype).view(rows, size))


@given(st.integers(-2, 5), st.sampled_from((0, 1, -1, 1.0, True)), st.sampled_from((None, "loop", "x")), st.integers(0, 3))
def test_other_arguments_are_taken_or_refused(members, batch_dim, fallback, rows):
    def use():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net = flipout.Perturbed(nn.Linear(2, 2), flipout.Gaussian(0.1), batch_dim=batch_dim, fallback=fallback)
            with net.hold(members):
                return net(torch.ones(rows, rows, 2))

    found = attempt(use)
    plausible = members > 0 and type(batch_dim) is int and batch_dim >= 0 and fallback != "x" and rows and rows % members == 0
    assert (found is not None) is bool(plausible)
