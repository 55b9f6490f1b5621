"""Recurrent layers: packed batches, states, signs over time, and a module left as it was. The laws of test_laws.py hold besides."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import EXACT, LISTED, Z_LIMIT, distance, worst, z_mean
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves, tree_map

import flipout
from flipout.rules import onednn

LENGTHS = (3, 5, 1, 5)
LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm_deep": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "lstm_projected": lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True),
    "gru_deep": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True),
    "rnn": lambda: nn.RNN(3, 4, bias=False),
    "rnn_relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)
CELLS: dict[str, tuple[type[nn.RNNBase], type[nn.RNNCellBase]]] = {
    "lstm": (nn.LSTM, nn.LSTMCell),
    "gru": (nn.GRU, nn.GRUCell),
    "rnn": (nn.RNN, nn.RNNCell),
}


def wrapped(module: nn.Module, estimator: flipout.Estimator = LISTED["flipout"], **options: Any) -> flipout.Perturbed:
    """In float64, under relative noise, whose gradients reach the means along two ways."""
    noise = options.pop("noise", flipout.MultiplicativeGaussian(0.5))
    return flipout.Perturbed(module.double(), noise, estimator, generator=torch.Generator().manual_seed(1), **options)


def states(layer: nn.RNNBase, rows: int) -> Any:
    """Random first states."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, rows, layer.proj_size or layer.hidden_size, dtype=torch.float64, requires_grad=True)
    if not isinstance(layer, nn.LSTM):
        return h
    return h, torch.randn(count, rows, layer.hidden_size, dtype=torch.float64, requires_grad=True)


def sequences(sort: bool = False) -> list[Tensor]:
    lengths = sorted(LENGTHS, reverse=True) if sort else LENGTHS
    return [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]


def alone(layer: nn.RNNBase, draw: flipout.Draw, xs: list[Tensor], hx: Any) -> tuple[Tensor, Any]:
    """Every sequence by itself through its own member's weights: padded outputs ``[T, B, …]`` and last states."""
    each = len(xs) // (draw.members or 1)
    outputs, finals = [], []
    for i, x in enumerate(xs):
        own = tree_map(lambda state, i=i: state[:, i : i + 1].contiguous(), hx)
        y, final = torch.func.functional_call(layer, draw.weights(i // each), (x.unsqueeze(1), own))
        outputs.append(nn.functional.pad(y, (0, 0, 0, 0, 0, max(LENGTHS) - len(x))))
        finals.append(final)
    return torch.cat(outputs, 1), tree_map(lambda *parts: torch.cat(parts, 1), *finals)


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in tree_leaves(tree)])


@every_layer
@pytest.mark.parametrize("estimator", LISTED)
@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("sort", [False, True])
def test_packed_sequences_keep_their_own_weights(layer: str, estimator: str, members: int, sort: bool) -> None:
    """Outputs, last states and every gradient, through sorting and unsorting, are those of each sequence run alone."""
    module = LAYERS[layer]()
    net = wrapped(module, LISTED[estimator])
    xs, hx = sequences(sort), states(module, len(LENGTHS))
    with net.hold(members) as draw:
        packed, final = net(pack_sequence(xs, enforce_sorted=sort), hx)
        ours = pad_packed_sequence(packed)[0], final
        theirs = alone(module, draw, xs, hx)
        wanted = [*xs, *tree_leaves(hx), *module.parameters()]
        for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
            assert distance(a, b) <= EXACT
        slopes = [torch.autograd.grad((flat(y) * torch.linspace(-1, 1, len(flat(y)))).sum(), wanted) for y in (ours, theirs)]
    for a, b in zip(*slopes, strict=True):
        assert distance(a, b) <= EXACT


@every_layer
def test_packed_sequences_differentiate_twice(layer: str) -> None:
    module = LAYERS[layer]()
    net = wrapped(module)
    xs, hx = sequences(), states(module, len(LENGTHS))
    wanted = [*xs, *tree_leaves(hx), *module.parameters()]

    def second(y: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(flat(y).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), wanted)

    with net.hold(len(LENGTHS)) as draw:
        packed, final = net(pack_sequence(xs, enforce_sorted=False), hx)
        ours = second((pad_packed_sequence(packed)[0], final))
        theirs = second(alone(module, draw, xs, hx))
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


@every_layer
@pytest.mark.parametrize("include", ["*weight_hh*", "*bias*", "*weight_ih*"])
def test_any_subset_of_the_weights(layer: str, include: str) -> None:
    module = LAYERS[layer]()
    if "bias" in include and not module.bias:
        pytest.skip("no bias")
    net = wrapped(module, include=include, noise=flipout.Gaussian(0.5))
    xs, hx = sequences(), states(module, len(LENGTHS))
    with net.hold(len(LENGTHS)) as draw:
        packed, final = net(pack_sequence(xs, enforce_sorted=False), hx)
        for a, b in zip(
            tree_leaves((pad_packed_sequence(packed)[0], final)), tree_leaves(alone(module, draw, xs, hx)), strict=True
        ):
            assert distance(a, b) <= EXACT


NOISES = {
    "relative": flipout.MultiplicativeGaussian(0.5),
    "learnable": flipout.Gaussian(0.3, learnable=True),
    "both": flipout.Gaussian(0.3, relative=True, learnable=True),
}


@every_layer
@pytest.mark.parametrize("noise", NOISES)
def test_gradients_reach_what_the_noise_is_made_of(layer: str, noise: str) -> None:
    """Means through relative noise, and scales: once, again from the same graph, and twice differentiated."""
    module = LAYERS[layer]()
    net = wrapped(module, noise=NOISES[noise])
    xs, hx = sequences(), states(module, len(LENGTHS))
    wanted = [*xs, *tree_leaves(hx), *net.parameters()]

    def slopes(y: Any) -> list[tuple[Tensor, ...]]:
        loss = flat(y).square().sum()
        first, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        built = torch.autograd.grad(loss, wanted, create_graph=True)
        return [first, built, torch.autograd.grad(sum(g.square().sum() for g in built), wanted)]

    with net.hold(len(LENGTHS)) as draw:
        packed, final = net(pack_sequence(xs, enforce_sorted=False), hx)
        ours, theirs = (slopes(y) for y in ((pad_packed_sequence(packed)[0], final), alone(module, draw, xs, hx)))
    for a, b in zip(flat_list(ours), flat_list(theirs), strict=True):
        assert distance(a, b) <= EXACT * max(1.0, b.abs().max().item())


def flat_list(groups: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return [tensor for group in groups for tensor in group]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("frozen", ["module.weight_hh_l0", "module.weight_ih_l0", "log_std.weight_hh_l0"])
def test_frozen_parts_change_no_other_gradient(noise: str, frozen: str) -> None:
    net = wrapped(nn.GRU(3, 4), noise=NOISES[noise])
    if frozen not in dict(net.named_parameters()):
        pytest.skip("this noise has no scale to freeze")
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    found = []
    for needed in (True, False):
        net.get_parameter(frozen).requires_grad_(needed)
        with net.hold(4, torch.Generator().manual_seed(0)):
            net(x)[0].square().sum().backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
        net.zero_grad()
    assert found[1].pop(frozen) is None
    for name, grad in found[1].items():
        assert distance(grad, found[0][name]) <= EXACT


def test_a_mean_that_the_noise_is_not_relative_to() -> None:
    """A module may change its weights before it uses them: ΔW is a multiple of the parameter, not of what became of it."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.LSTM(3, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            state = x.new_zeros(1, x.shape[1], 4)
            weights = [self.inner.weight_ih_l0 + 0.5, 2.0 * (self.inner.weight_hh_l0 - 0.5) + 1.5]
            return torch.lstm(x, (state, state), weights, False, 1, 0.0, True, False, False)[0]

    model, x = Shifted(), torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    net = wrapped(model, batch_dim=1)
    with net.hold(4) as draw:
        ours = net(x)
        rows = [torch.func.functional_call(model, draw.weights(n), (x[:, n : n + 1],)) for n in range(4)]
    theirs = torch.cat(rows, 1)
    slopes = [torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) for y in (ours, theirs)]
    for a, b in zip((ours, *slopes[0]), (theirs, *slopes[1]), strict=True):
        assert distance(a, b) <= EXACT


@every_layer
@pytest.mark.parametrize("noise", ["relative", "learnable"])
@pytest.mark.parametrize("ragged", [False, True])
def test_large_products_in_single_precision(layer: str, noise: str, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that large float32 matrices take, here taken by small ones, agrees with the other one to rounding."""
    if onednn._linear is None or not torch.backends.mkldnn.enabled:
        pytest.skip("torch is built without oneDNN here: there is one way only")
    if LAYERS[layer]().proj_size:
        pytest.skip("a projected layer does not take it")
    taken, linear = [], onednn._linear_of
    monkeypatch.setattr(onednn, "_linear_of", lambda *operands: taken.append(1) or linear(*operands))
    module, lengths = LAYERS[layer](), [9, 9, 9, 6, 2, 1] if ragged else [9] * 6
    net, x, results = flipout.Perturbed(module, NOISES[noise]), torch.randn(9, 6, 3, requires_grad=True), []
    for least in (10**9, 1):
        assert not taken
        monkeypatch.setattr(onednn, "_LARGE", least)
        with net.hold(6, torch.Generator().manual_seed(0)):
            y, final = net(pack_padded_sequence(x, torch.tensor(lengths)))
            slopes = torch.autograd.grad(y.data.square().sum() + flat(final).square().sum(), [x, *net.parameters()])
        results.append([y.data, *tree_leaves(final), *slopes])
    for a, b in zip(*results, strict=True):
        assert distance(a, b) <= 1e-5 * max(1.0, a.abs().max().item())
    assert taken


MEMORY_NOISES = {
    "fixed": flipout.Gaussian(0.1),
    "learnable": flipout.Gaussian(0.1, learnable=True),
    "relative": flipout.MultiplicativeGaussian(0.1),
    "dropconnect": flipout.DropConnect(0.5),
}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("noise", MEMORY_NOISES)
def test_memory_between_forward_and_backward(kind: type[nn.RNNBase], noise: str) -> None:
    """What the plain layer keeps, one ΔW, the signs as they are kept (bits where they are many), and 10 %."""
    module, batch = kind(160, 200), 8
    x = torch.randn(30, batch, 160, requires_grad=True)
    weights = sum(p.nbytes for p in module.parameters())
    signs = 4 * batch * sum(sum(p.shape) for name, p in module.named_parameters() if "weight" in name)
    plain = _kept_bytes(module, x)
    if kind is not nn.LSTM:  # torch composes these of parts, which keep more; a layer needs its input, its gates and its states
        gates = {nn.GRU: 3, nn.RNN: 1}[kind]
        plain = min(plain, 4 * 30 * batch * (160 + 200 * gates + 2 * 200))
    assert _kept_bytes(flipout.Perturbed(module, MEMORY_NOISES[noise]), x) <= 1.1 * (plain + weights + signs)


def _kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that one forward pass saves, parameters excluded."""
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    del y
    return sum(kept.values())


class Tagger(nn.Module):
    """Packs inside, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(8, 2)
        self.layer = nn.LSTM(3, 4, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.table(ids), lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0])


def test_a_model_that_packs_inside() -> None:
    model, ids, lengths = Tagger().double(), torch.randint(7, (4, 5)), torch.tensor(LENGTHS)
    with flipout.perturbed(model, flipout.Gaussian(0.5)) as draw:
        y = model(ids, lengths)
        plain = [draw.module(n) for n in range(4)]
    for n, length in enumerate(LENGTHS):
        own = plain[n](ids[n : n + 1, :length], lengths[n : n + 1])
        assert distance(y[n, :length], own[0]) <= EXACT


def test_perturbed_around_a_packed_call() -> None:
    """The order is read off a call that had begun when the weights were placed."""
    module, xs = nn.GRU(3, 4).double(), sequences()
    with flipout.perturbed(module, flipout.Gaussian(0.5)) as draw:
        y, _ = pad_packed_sequence(module(pack_sequence(xs, enforce_sorted=False))[0])
        for n, x in enumerate(xs):
            assert distance(y[: len(x), n], draw.module(n)(x)[0]) <= EXACT


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("estimator", LISTED)
def test_stepping_a_cell_equals_the_sequence(kind: str, estimator: str) -> None:
    layer, cell = (build(3, 4) for build in CELLS[kind])
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(layer.parameters()), cell.parameters())
    nets = [wrapped(module, LISTED[estimator], noise=flipout.Gaussian(0.5)) for module in (layer, cell)]
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    with nets[0].hold(3, torch.Generator().manual_seed(3)), nets[1].hold(3, torch.Generator().manual_seed(3)):
        whole, state, outputs = nets[0](x)[0], None, []
        for x_t in x:
            state = nets[1](x_t, state)
            outputs.append(state[0] if kind == "lstm" else state)
    assert distance(torch.stack(outputs), whole) <= EXACT


@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_are_where_batch_first_says(batch_first: bool) -> None:
    net = wrapped(nn.GRU(3, 4, batch_first=batch_first), batch_dim=0)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    with net.hold(5 if batch_first else 4) as draw:
        net(x)
        assert draw.members == (5 if batch_first else 4)
        assert (
            distance(net(x)[0].select(0 if batch_first else 1, 1), draw.module(1)(x.select(0 if batch_first else 1, 1))[0]) <= EXACT
        )


def test_an_unbatched_sequence() -> None:
    net = wrapped(nn.LSTM(3, 4))
    x = torch.randn(5, 3, dtype=torch.float64)
    assert net(x)[0].shape == (5, 4)
    with net.hold(1) as draw:
        assert distance(net(x)[0], draw.module(0)(x)[0]) <= EXACT


def test_dropout_between_layers() -> None:
    """With vanishing noise it drops what the plain layer drops."""
    module = nn.GRU(3, 4, num_layers=3, dropout=0.5).double()
    net = flipout.Perturbed(module, flipout.Gaussian(1e-300), generator=torch.Generator())
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    torch.manual_seed(0)
    y = net(x)[0]
    torch.manual_seed(0)
    assert distance(y, module(x)[0]) <= EXACT
    assert distance(y, module(x)[0]) > 1e-3


# --- signs over time --------------------------------------------------------------------------------------------------


def feedforward(per_step: bool, rows: int = 2) -> tuple[flipout.Perturbed, Tensor]:
    """A layer whose output is tanh(W_n x_t) and the same input at every step."""
    module = nn.RNN(3, 4, bias=False).double()
    nn.init.zeros_(module.weight_hh_l0)
    net = wrapped(module, flipout.Flipout(per_step=per_step), include="weight_ih*", noise=flipout.Gaussian(0.3))
    return net, torch.ones(6, rows, 3, dtype=torch.float64)


def test_signs_are_held_over_time() -> None:
    net, x = feedforward(per_step=False)
    y, _ = net(x)
    assert distance(y, y[:1].expand_as(y)) <= EXACT
    assert distance(y[0, 0], y[0, 1]) > 1e-3


def test_signs_per_step_are_drawn_anew() -> None:
    net, x = feedforward(per_step=True)
    y, _ = net(x)
    rows = y.flatten(0, 1)
    assert len(torch.unique(rows.round(decimals=9), dim=0)) > 6


@pytest.mark.parametrize("per_step", [False, True])
def test_variance_of_a_step(per_step: bool) -> None:
    """Either way the pre-activation at any step has the variance that the noise gives it: std² |x|²."""
    net, x = feedforward(per_step, rows=1)
    mean = torch.nn.functional.linear(x[0, 0], net.module.weight_ih_l0)
    with torch.no_grad():
        last = torch.stack([net(x)[0][-1, 0] for _ in range(600)]).atanh() - mean
    assert worst(z_mean(last, 0.0)) < Z_LIMIT
    assert worst(z_mean(last.square(), 0.09 * 3)) < Z_LIMIT


@every_layer
def test_per_step_serves_every_layer(layer: str) -> None:
    module = LAYERS[layer]()
    net = wrapped(module, flipout.Flipout(per_step=True))
    hx = states(module, len(LENGTHS))
    y, _ = net(pack_sequence(sequences(), enforce_sorted=False), hx)
    y.data.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    first, second = (net(torch.ones(2, 5, 3, dtype=torch.float64))[0] for _ in range(2))
    assert distance(first, second) > 1e-6
    with net.hold(4) as draw, pytest.raises(flipout.DrawError, match="no weights of their own"):
        draw.weights(0)


@pytest.mark.parametrize("granularity", [{"per_step": True}, {"granularity": "token"}])
def test_cells_draw_per_step(granularity: dict[str, Any]) -> None:
    net = wrapped(nn.LSTMCell(3, 4), flipout.Flipout(**granularity))
    x = torch.ones(2, 3, dtype=torch.float64)
    with net.hold(2):
        assert distance(net(x)[0], net(x)[0]) > 1e-6


# --- a module left as it was ------------------------------------------------------------------------------------------


def assert_untouched(module: nn.RNNBase, before: tuple[Any, Any]) -> None:
    assert module._flat_weights is before[0]
    assert module._flat_weight_refs is before[1]
    own = dict(module.named_parameters())
    for name, weight, reference in zip(module._flat_weights_names, *before, strict=True):
        assert type(weight) is nn.Parameter
        assert weight is own[name] is reference()
    assert not module._forward_pre_hooks


def test_the_module_is_left_as_it_was() -> None:
    module = nn.LSTM(3, 4, num_layers=2)
    net = flipout.Perturbed(module, flipout.Gaussian(0.1))
    before = module._flat_weights, module._flat_weight_refs
    net(torch.randn(5, 2, 3))
    assert_untouched(module, before)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        net(torch.randn(5, 2, 7))
    assert_untouched(module, before)
    with flipout.perturbed(module, flipout.Gaussian(0.1)):
        module(torch.randn(5, 2, 3))
        assert module._flat_weights is before[0]
    assert_untouched(module, before)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(type(weight) is nn.Parameter for weight in twin.module._flat_weights)
        assert twin(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_outputs_may_be_changed_in_place() -> None:
    net = wrapped(nn.RNN(3, 4), noise=flipout.Gaussian(0.1))
    y, final = net(torch.randn(5, 2, 3, dtype=torch.float64))
    with torch.no_grad():
        final.zero_()
    y.sum().backward()


@torch._dynamo.config.patch(allow_rnn=True)
def test_compiles_in_one_graph() -> None:
    module = nn.LSTM(3, 4)
    net = flipout.Perturbed(module, flipout.Gaussian(0.1))
    before = module._flat_weights, module._flat_weight_refs
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, 3)
    with net.hold(2):
        assert distance(compiled(x)[0], net(x)[0]) < 1e-6
    assert all(a is b for a, b in zip(module._flat_weights, before[0], strict=True))


# --- what cannot be done ----------------------------------------------------------------------------------------------


def test_local_reparameterization_is_refused() -> None:
    noise, local = flipout.Gaussian(0.1), flipout.LocalReparameterization()
    for module, x in ((nn.LSTM(3, 4), torch.randn(5, 2, 3)), (nn.GRUCell(3, 4), torch.randn(2, 3))):
        with pytest.raises(flipout.UnsupportedNoiseError, match=r"'weight_ih.*every time step"):
            flipout.Perturbed(module, noise, local)(x)
        assert all(type(p) is nn.Parameter for p in module._parameters.values())
    biases = flipout.Perturbed(nn.LSTM(3, 4), noise, local, include="bias*")
    assert biases(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)


def test_a_packed_batch_that_disagrees_with_the_draw() -> None:
    net = wrapped(nn.LSTM(3, 4))
    before = net.module._flat_weights, net.module._flat_weight_refs
    packed = pack_sequence(sequences(), enforce_sorted=False)
    with net.hold(3), pytest.raises(flipout.BatchError, match=r"4 rows.*3 members"):
        net(packed)
    assert_untouched(net.module, before)


def test_rows_that_are_not_the_modules_own() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]  # [rows, time, features] read as [time, rows, features]

    with pytest.raises(flipout.BatchError, match=r"gru met 'layer.weight_ih_l0' with a batch of 5 sequences.*batch_first"):
        wrapped(Folded())(torch.randn(2, 5, 3, dtype=torch.float64))


def test_packed_data_outside_of_its_layer() -> None:
    """The order of the sequences is followed from the packed batch to the operation."""

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4)

        def forward(self, packed: PackedSequence) -> Tensor:
            layer, h = self.layer, torch.zeros(1, 4, 4, dtype=torch.float64)
            weights = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
            return torch.gru(packed.data, packed.batch_sizes, h, weights, True, 1, 0.0, False, False)[0]

    net, given = wrapped(Loose()), sequences()
    packed = pack_sequence(given, enforce_sorted=False)
    with net.hold(len(given)) as draw:
        y = net(packed)
        lengths = [len(sequence) for sequence in given]
        padded, _ = pad_packed_sequence(packed._replace(data=y), batch_first=True)
        for n, sequence in enumerate(given):
            own, _ = draw.module(n).layer(sequence)
            assert distance(padded[n, : lengths[n]], own) <= EXACT


def test_states_of_another_batch() -> None:
    x, wrong = torch.randn(5, 2, 3, dtype=torch.float64), torch.zeros(1, 3, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Expected hidden"):
        wrapped(nn.LSTM(3, 4))(x, (wrong, wrong))
    with pytest.raises(flipout.BatchError, match=r"initial state of shape \(1, 3, 4\) for a batch of 4"):
        wrapped(nn.LSTM(3, 4))(pack_sequence(sequences(True)), (wrong, wrong))
    with pytest.raises(flipout.BatchError, match=r"gru_cell.*\(2, 3\).*\(3, 4\)"):
        wrapped(nn.GRUCell(3, 4))(x[0], wrong[0])


def test_a_sequence_without_steps() -> None:
    with pytest.raises(flipout.BatchError, match="without steps"):
        wrapped(nn.RNN(3, 4))(torch.randn(0, 2, 3, dtype=torch.float64))
