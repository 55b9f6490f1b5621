"""Attention against the oracle, option by option, and torch's fused fast paths, which must not lose the noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, distance
from torch import Tensor, nn
from torch.nn import functional as F

import flipout

N, L, S, WIDTH, HEADS = 4, 5, 3, 16, 4
NOISE = flipout.Gaussian(0.3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def attention(**options: Any) -> nn.MultiheadAttention:
    """A module with no parameter at a special value, in evaluation mode."""
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    return made


def by_member(module: nn.Module, draw: flipout.Draw, call: Callable[[Callable[..., Any], int], Any]) -> list[Any]:
    """``call(module with member n's weights, n)`` for every member."""
    results = []
    for n in range(draw.members or 0):
        weights = draw.weights(n)
        results.append(call(lambda *a, _w=weights, **k: torch.func.functional_call(module, _w, a, k), n))
    return results


SELF_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "bias_kv_and_zero": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", SELF_OPTIONS)
def test_self_attention_and_its_weights(options: str, batch_first: bool, estimator: str) -> None:
    module = attention(batch_first=batch_first, **SELF_OPTIONS[options])
    net = flipout.Perturbed(module, NOISE, LISTED[estimator], generator=seeded())
    assert net.batch_dim == (0 if batch_first else 1)
    x = rows(N, L, WIDTH) if batch_first else rows(L, N, WIDTH)
    with net.hold(members=N) as draw:
        y, weights = net(x, x, x)
        single = by_member(module, draw, lambda f, n: f(*[x.narrow(net.batch_dim, n, 1)] * 3))
    assert distance(y, torch.cat([one for one, _ in single], net.batch_dim)) < EXACT
    assert distance(weights, torch.cat([one for _, one in single])) < EXACT


CROSS: dict[str, tuple[dict[str, Any], int, int]] = {
    "same_width": ({}, WIDTH, WIDTH),
    "kdim": ({"kdim": 6}, 6, WIDTH),
    "kdim_vdim": ({"kdim": 6, "vdim": 10}, 6, 10),
    "kdim_vdim_bias_kv": ({"kdim": 6, "vdim": 10, "add_bias_kv": True}, 6, 10),
    "kdim_no_bias": ({"kdim": 6, "vdim": 10, "bias": False}, 6, 10),
}


@pytest.mark.parametrize("options", CROSS)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_cross_attention(options: str, shared_memory: bool) -> None:
    arguments, kdim, vdim = CROSS[options]
    module = attention(batch_first=True, **arguments)
    net = flipout.Perturbed(module, NOISE, generator=seeded())
    q, k, v = rows(N, L, WIDTH), rows(N, S, kdim, seed=2), rows(N, S, vdim, seed=3)
    if shared_memory and kdim == vdim:
        v = k  # one tensor for both takes a path of its own
    with net.hold(members=N) as draw:
        y, weights = net(q, k, v, average_attn_weights=False)
        single = by_member(module, draw, lambda f, n: f(q[n : n + 1], k[n : n + 1], v[n : n + 1], average_attn_weights=False))
    assert weights.shape == (N, HEADS, L, S + bool(module.bias_k is not None))
    assert distance(y, torch.cat([one for one, _ in single])) < EXACT
    assert distance(weights, torch.cat([one for _, one in single])) < EXACT


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


MASKS: dict[str, Callable[[], dict[str, Any]]] = {
    "bool": lambda: {"attn_mask": causal(L)},
    "float": lambda: {"attn_mask": rows(L, L, seed=5)},
    "causal_hint": lambda: {"attn_mask": causal(L), "is_causal": True},
    "per_head": lambda: {"attn_mask": rows(N * HEADS, L, L, seed=6)},
    "padding": lambda: {"key_padding_mask": torch.arange(L) > torch.tensor([[4], [2], [3], [1]])},
    "both": lambda: {"attn_mask": causal(L), "key_padding_mask": torch.arange(L) > torch.tensor([[4], [2], [3], [1]])},
    "both_causal_hint": lambda: {
        "attn_mask": causal(L),
        "is_causal": True,
        "key_padding_mask": torch.arange(L) > torch.tensor([[4], [2], [3], [1]]),
    },
    "float_padding": lambda: {"key_padding_mask": rows(N, L, seed=7)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", ["plain", "bias_kv_and_zero"])
def test_masks(mask: str, need_weights: bool, options: str) -> None:
    module = attention(batch_first=True, **SELF_OPTIONS[options])
    net = flipout.Perturbed(module, NOISE, generator=seeded())
    masks = MASKS[mask]()
    x = rows(N, L, WIDTH)

    def of_member(n: int) -> dict[str, Any]:
        own = dict(masks)
        if "key_padding_mask" in own:
            own["key_padding_mask"] = own["key_padding_mask"][n : n + 1]
        if mask == "per_head":
            own["attn_mask"] = own["attn_mask"][n * HEADS : (n + 1) * HEADS]
        return own

    with net.hold(members=N) as draw:
        y, weights = net(x, x, x, need_weights=need_weights, **masks)
        single = by_member(module, draw, lambda f, n: f(*[x[n : n + 1]] * 3, need_weights=need_weights, **of_member(n)))
    assert distance(y, torch.cat([one for one, _ in single])) < EXACT
    assert (weights is None) is not need_weights
    if weights is not None:
        assert distance(weights, torch.cat([one for _, one in single])) < EXACT


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_falls_where_torch_lets_it_fall(need_weights: bool) -> None:
    module = attention(batch_first=True, dropout=0.4).train()
    net = flipout.Perturbed(module, flipout.Gaussian(1e-14), generator=seeded())
    x = rows(N, L, WIDTH)
    torch.manual_seed(3)
    y, weights = net(x, x, x, need_weights=need_weights)
    torch.manual_seed(3)
    expected, expected_weights = module(x, x, x, need_weights=need_weights)
    assert distance(y, expected) < EXACT
    if weights is not None:
        assert distance(weights, expected_weights) < EXACT
        assert bool((weights == 0).any()) or need_weights


@pytest.mark.parametrize(
    ("include", "count"), [("in_proj_weight", 1), ("out_proj.*", 2), ("bias_k", 1), (("*_proj_weight", "in_proj_bias"), 4)]
)
def test_any_subset_of_the_parameters(include: str | tuple[str, ...], count: int) -> None:
    separate = "*_proj_weight" in include
    module = attention(batch_first=True, **({"kdim": WIDTH, "vdim": 6} if separate else {"add_bias_kv": True}))
    net = flipout.Perturbed(module, NOISE, include=include, generator=seeded())
    assert len(net.noises) == count
    q, v = rows(N, L, WIDTH), rows(N, L, 6 if separate else WIDTH, seed=2)
    with net.hold(members=N) as draw:
        y, _ = net(q, q, v)
        single = by_member(module, draw, lambda f, n: f(q[n : n + 1], q[n : n + 1], v[n : n + 1])[0])
    assert distance(y, torch.cat(single)) < EXACT


def test_projections_that_torch_hides_from_rules_are_refused() -> None:
    module = attention(batch_first=True, kdim=6)
    with pytest.raises(flipout.ArgumentError, match=r"q_proj_weight.*out_proj"):
        flipout.Perturbed(module, NOISE, include="*_proj_weight")


def test_member_blocks_and_gradients() -> None:
    module = attention(batch_first=True)
    net = flipout.Perturbed(module, flipout.MultiplicativeGaussian(0.3), generator=seeded())
    x = rows(2 * N, L, WIDTH)
    with net.hold(members=N) as draw:
        net(x, x, x)[0].pow(3).sum().backward()
        found = [parameter.grad.clone() for parameter in module.parameters()]
        module.zero_grad()
        torch.cat(by_member(module, draw, lambda f, n: f(*[x[2 * n : 2 * n + 2]] * 3)[0])).pow(3).sum().backward()
    for got, parameter in zip(found, module.parameters(), strict=True):
        assert distance(got, parameter.grad) < 1e-8 * parameter.grad.abs().max()


def test_byte_aligned_slices_of_signs_stay_packed() -> None:
    seen: list[bool] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(48, 4))

        def forward(self, x: Tensor) -> Tensor:
            for piece in self.weight.chunk(3):
                seen.extend(factor.packed for term in piece.terms for factor in term.factors)
            return x

    flipout.Perturbed(Watch(), NOISE)(torch.zeros(2**15, 4))
    assert seen == [True] * 6


# --- the layers that torch builds of it, and their fast paths ---------------------------------------------------------------


def _layer(kind: type[nn.Module], batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    return kind(WIDTH, HEADS, 24, 0.0, batch_first=batch_first, norm_first=norm_first)  # type: ignore[call-arg]


def _stack(batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    inner = _layer(nn.TransformerEncoderLayer, batch_first, norm_first)
    return nn.TransformerEncoder(inner, 2, enable_nested_tensor=batch_first and not norm_first)  # type: ignore[arg-type]


def _decoder(batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    return nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer, batch_first, norm_first), 2)  # type: ignore[arg-type]


def _whole(batch_first: bool = True, norm_first: bool = False) -> nn.Module:
    made = nn.Transformer(WIDTH, HEADS, 1, 1, 24, 0.0, batch_first=batch_first, norm_first=norm_first)
    made.encoder.enable_nested_tensor = made.encoder.use_nested_tensor = batch_first and not norm_first
    return made


LAYERS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "encoder_layer": (lambda *a: _layer(nn.TransformerEncoderLayer, *a), 1),
    "decoder_layer": (lambda *a: _layer(nn.TransformerDecoderLayer, *a), 2),
    "encoder": (_stack, 1),
    "decoder": (_decoder, 2),
    "transformer": (_whole, 2),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("batch_first", "norm_first"), [(True, True), (True, False), (False, True), (False, False)])
def test_transformer_layers_in_training_and_in_evaluation(layer: str, batch_first: bool, norm_first: bool) -> None:
    make, count = LAYERS[layer]
    torch.manual_seed(0)
    module = make(batch_first, norm_first).double()
    net = flipout.Perturbed(module, NOISE, generator=seeded())
    assert net.batch_dim == (0 if batch_first else 1)
    inputs = [rows(N, length, WIDTH, seed=length) for length in (L, S)[:count]]
    if not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    for mode, guard in itertools.product((True, False), (torch.enable_grad, torch.no_grad, torch.inference_mode)):
        net.train(mode)
        with guard():
            if not mode:
                assert torch.equal(net(*inputs), module(*inputs))
            with net.hold(members=N) as draw, net.sampling():
                y = net(*inputs)
                single = by_member(module, draw, lambda f, n: f(*(x.narrow(net.batch_dim, n, 1) for x in inputs)))
            assert distance(y, torch.cat(single, net.batch_dim)) < EXACT


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("estimator", LISTED)
def test_nested_fast_path_of_a_padded_batch(estimator: str) -> None:
    torch.manual_seed(0)
    module = _stack().double().eval()
    net = flipout.Perturbed(module, NOISE, LISTED[estimator], generator=seeded())
    x, padding = rows(N, L, WIDTH), torch.arange(L) > torch.tensor([[4], [2], [3], [1]])
    with torch.no_grad(), net.hold(members=N) as draw:
        y = net(x, src_key_padding_mask=padding)
        with torch.enable_grad():  # the plain path of the oracle
            single = by_member(module, draw, lambda f, n: f(x[n : n + 1], src_key_padding_mask=padding[n : n + 1]).detach())
    kept = ~padding
    assert distance(y[kept], torch.cat(single)[kept]) < EXACT


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_padding_around_a_layer_that_is_perturbed_alone(nested: bool) -> None:
    """Torch would pack the padded batch into a nested tensor; inside a call that perturbs a weight it does not."""
    module = _stack().double().eval()
    net = flipout.Perturbed(module, NOISE, include="layers.1.*", generator=seeded())
    x, padding = rows(N, L, WIDTH), torch.arange(L) > torch.tensor([[4], [2], [3], [1]])
    module.use_nested_tensor = nested
    with net.hold(members=N) as draw, torch.no_grad():
        y = net(x, src_key_padding_mask=padding)
        single = by_member(module, draw, lambda f, n: f(x[n : n + 1], src_key_padding_mask=padding[n : n + 1]))
    assert distance(y[~padding], torch.cat(single)[~padding]) < EXACT


def test_tokens_draw_their_own_signs() -> None:
    module = attention(batch_first=True, add_bias_kv=True)
    net = flipout.Perturbed(module, NOISE, flipout.Flipout(granularity="token"), generator=seeded())
    x = rows(1, 1, WIDTH).expand(2, L, WIDTH)
    y, _ = net(x, x, x)
    assert len(torch.unique(y.reshape(-1, WIDTH), dim=0)) == 2 * L
    alone, _ = net(x[0], x[0], x[0])  # an unbatched sequence has tokens too
    assert alone.shape == (L, WIDTH)
    draws = torch.stack([net(x, x, x)[0][:, :, 0].flatten() for _ in range(60)])
    assert draws.std(0).min() > 0.05


def test_local_reparameterization_refuses_sequences() -> None:
    net = flipout.Perturbed(attention(batch_first=True), NOISE, flipout.LocalReparameterization())
    x = rows(N, L, WIDTH)
    with pytest.raises(flipout.UnsupportedNoiseError, match="in_proj_weight"):
        net(x, x, x)


class Inside(nn.Module):
    """Attention with its rows on axis 1 inside a module that has them on axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def test_rows_on_the_wrong_dimension_raise() -> None:
    module = Inside().double()
    x = rows(L, N, WIDTH)
    before = dict(module.named_parameters())
    with pytest.raises(flipout.BatchError, match=r"in_proj_weight.*batch_dim.*1"):
        flipout.Perturbed(module, NOISE)(x)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert flipout.Perturbed(module, NOISE, batch_dim=1)(x).shape == x.shape


def test_unbatched_input_is_one_example_and_no_more() -> None:
    net = flipout.Perturbed(attention(), NOISE, generator=seeded())
    x = rows(L, WIDTH)
    y, weights = net(x, x, x)
    assert y.shape == (L, WIDTH)
    assert weights.shape == (L, L)
    with net.hold(members=3), pytest.raises(flipout.BatchError, match="3 members"):
        net(x, x, x)


def test_a_weight_where_the_data_should_be_raises() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.zeros(L, 1, WIDTH))
            self.attention = nn.MultiheadAttention(WIDTH, HEADS)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.queries, x, x)[0]

    net = flipout.Perturbed(Queries().double(), NOISE, include="queries", batch_dim=1)
    with pytest.raises(flipout.MissingRuleError, match="queries"):
        net(rows(L, N, WIDTH))


def test_learned_queries_expanded_to_the_batch_are_each_rows_own() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 2, WIDTH))
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.queries.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0]

    torch.manual_seed(0)
    module = Pool().double()
    net = flipout.Perturbed(module, NOISE, generator=seeded())
    x = rows(N, L, WIDTH)
    with net.hold(members=N) as draw:
        y = net(x)
        assert distance(y, torch.cat(by_member(module, draw, lambda f, n: f(x[n : n + 1])))) < EXACT


def test_a_mask_of_the_wrong_shape_raises_as_in_torch() -> None:
    net = flipout.Perturbed(attention(batch_first=True), NOISE)
    x = rows(N, L, WIDTH)
    with pytest.raises(ValueError, match="attn_mask"):
        net(x, x, x, attn_mask=torch.zeros(L, L + 1))
    with pytest.raises(ValueError, match="is_causal"):
        net(x, x, x, is_causal=True)


def test_compiles_into_one_graph() -> None:
    net = flipout.Perturbed(attention(batch_first=True), NOISE, generator=None)
    x = rows(N, L, WIDTH)
    with net.hold(members=N):
        expected = net(x, x, x)[0]
        compiled = torch.compile(lambda t: net(t, t, t)[0], fullgraph=True, backend="eager")
        assert distance(compiled(x), expected) < EXACT


def test_rule_takes_static_keys_and_values() -> None:
    module = attention()
    net = flipout.Perturbed(module, NOISE, generator=seeded())
    x, fixed = rows(L, N, WIDTH), rows(N * HEADS, S, WIDTH // HEADS, seed=4)

    def run(m: nn.MultiheadAttention, inputs: Tensor, keys: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            inputs, inputs, inputs, WIDTH, HEADS, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0,
            m.out_proj.weight, m.out_proj.bias, training=False, static_k=keys, static_v=keys,
        )[0]  # fmt: skip

    module.forward = lambda inputs: run(module, inputs, fixed)  # type: ignore[method-assign]
    with net.hold(members=N) as draw:
        y = net(x)
        plain = [run(draw.module(n), x[:, n : n + 1], fixed[n * HEADS : (n + 1) * HEADS]) for n in range(N)]  # type: ignore[arg-type]
    assert distance(y, torch.cat(plain, 1)) < EXACT
