"""The methods of Tables 2 and 3: each against plain Python, how long masks last, and that the module is left as it was."""

import copy
import itertools
import pickle

import pytest
import recurrent_by_hand as by_hand
import torch
from torch import nn

import flipout
from flipout.errors import ArgumentError
from flipout.regularize import CHAR, TRANSFORMER, WORD, Dropout, EmbeddingDropout, Method, Regularized, Zoneout, masks, recurrence
from flipout.streams import stream
from flipout_experiments.nets.networks import CharLSTM, WordLSTM

ROWS, STEPS, WORDS, UNITS = 3, 4, 5, 6
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Model(nn.Module):
    """Tokens to hidden states: embeddings (or one-hot vectors) and a stack of recurrent layers."""

    def __init__(self, kind=nn.LSTM, layers=2, embed=True, **options):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4) if embed else None
        self.rnn = kind(4 if embed else WORDS, UNITS, layers, batch_first=True, **options)

    def forward(self, tokens, state=None):
        inputs = (
            self.embedding(tokens) if self.embedding is not None else nn.functional.one_hot(tokens, WORDS).to(self.rnn.weight_hh_l0)
        )
        return self.rnn(inputs, state)


@pytest.fixture
def drawn(monkeypatch):
    """Every mask that is drawn, as zeros and ones."""
    found = []
    real = masks.bernoulli

    def record(*args):
        found.append(real(*args).clone())
        return found[-1].clone()

    monkeypatch.setattr(masks, "bernoulli", record)
    monkeypatch.setattr(recurrence, "bernoulli", record)
    return found


def by_reference(net, module, drawn, tokens, states, weights, active=True):
    """Outputs and last states of plain Python, with the masks that were drawn and each sequence's weights."""
    method, left = net.method, [mask.clone() for mask in drawn]
    inputs = nn.functional.one_hot(tokens, WORDS).double()
    if module.embedding is not None:
        inputs = module.embedding.weight[tokens]
        if method.embedding is not None and active:
            kept = left.pop(0) / (1 - method.embedding.p)
            rows = [[kept[n if len(kept) > 1 else 0][word] for word in words] for n, words in enumerate(tokens.tolist())]
            inputs = inputs * torch.stack([torch.stack(row) for row in rows])[..., None]
    layers = [
        [[weights(n)[f"rnn.{name}_l{k}"].tolist() for name in WEIGHTS] for k in range(module.rnn.num_layers)] for n in range(ROWS)
    ]
    h, c = (state.tolist() for state in states)
    remaining = by_hand.Masks(left)
    found = by_hand.run(module.rnn.mode, layers, inputs.tolist(), method, remaining, (h, c), active)
    assert not remaining.left  # every mask that was drawn has its place in the definition
    return [torch.tensor(each, dtype=torch.float64) for each in found]


def compare(method, drawn, kind=nn.LSTM, layers=2, embed=True, train=True, **options):
    module = Model(kind, layers, embed, **options).double()
    net = Regularized(module, method).train(train)
    tokens = torch.randint(WORDS, (ROWS, STEPS), generator=stream(1))
    states = tuple(torch.randn(layers, ROWS, UNITS, dtype=torch.float64, generator=stream(2)) for _ in range(2))
    lstm = kind is nn.LSTM
    plain = dict(module.named_parameters())
    if method.noise is not None and train:
        with net.net.hold(ROWS, stream(3)) as draw, torch.no_grad():
            output, last = net(tokens, states)
            weights = [{**plain, **draw.weights(n)} for n in range(ROWS)]
    else:
        with torch.no_grad():
            output, last = net(tokens, states if lstm else states[0])
        weights = [plain] * ROWS
    expected = by_reference(net, module, drawn, tokens, states, lambda n: weights[n], train)
    torch.testing.assert_close(output, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(last[0] if lstm else last, expected[1], rtol=0, atol=1e-10)
    if lstm:
        torch.testing.assert_close(last[1], expected[2], rtol=0, atol=1e-10)
    return output


@pytest.mark.parametrize("name", CHAR)
def test_methods_of_table_2_are_their_definitions(name, drawn):
    compare(CHAR[name], drawn, layers=1, embed=False)


@pytest.mark.parametrize("name", WORD)
def test_methods_of_table_3_are_their_definitions(name, drawn):
    compare(WORD[name], drawn)


OTHERS = {
    "hidden": Method(hidden=Dropout(0.3)),
    "hidden per step": Method(hidden=Dropout(0.3, per="step")),
    "zones": Method(zoneout=Zoneout(hidden=0.4)),
    "everything outside": Method(inputs=Dropout(0.2), between=Dropout(0.3, per="step"), outputs=Dropout(0.4)),
}


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN])
@pytest.mark.parametrize("name", OTHERS)
def test_other_recurrent_layers_follow_theirs(kind, name, drawn):
    compare(OTHERS[name], drawn, kind)


def test_a_grus_update_and_a_relu_layer(drawn):
    compare(Method(update=Dropout(0.4)), drawn, nn.GRU)
    drawn.clear()
    compare(Method(hidden=Dropout(0.4)), drawn, nn.RNN, nonlinearity="relu")


def test_masks_and_random_weights_together(drawn):
    compare(Method(zoneout=Zoneout(0.3, 0.2), hidden=Dropout(0.2), noise=flipout.Gaussian(0.3)), drawn)


@pytest.mark.parametrize("method", [WORD["zoneout"], CHAR["zoneout"]])
def test_zones_are_their_expectations_in_evaluation_mode(method, drawn):
    compare(method, drawn, train=False)
    assert not drawn


def test_weights_of_each_method_have_the_law_of_the_paper():
    """Sec. 2.1 and Eq. 3, entry by entry: W = W̄(1 + ε) shared, or W_n = W̄ + ΔW ∘ E_n with E_n of rank one."""
    module = Model().double()
    for table, name in ((CHAR, "gaussian"), (CHAR, "gaussian-flipout"), (WORD, "wd"), (WORD, "wd-flipout")):
        net = Regularized(module, table[name])
        with net.net.hold(ROWS, stream(4)) as draw:
            weights = [draw.weights(n) for n in range(ROWS)]
        assert set(weights[0]) == {"rnn.weight_hh_l0", "rnn.weight_hh_l1"}
        for key, mean in ((key, dict(module.named_parameters())[key]) for key in weights[0]):
            noise = [((weights[n][key] - mean) / mean).tolist() for n in range(ROWS)]
            if name.startswith("wd"):  # dropped, or kept and doubled
                assert all(min(abs(e + 1), abs(e - 1)) < 1e-10 for row in noise[1] for e in row)
            if not name.endswith("flipout"):
                assert noise[0] == noise[1] == noise[2]
                continue
            for n in (1, 2):
                signs = [
                    [b / a for a, b in zip(first, other, strict=True)] for first, other in zip(noise[0], noise[n], strict=True)
                ]
                for i, j in itertools.product(range(len(signs)), range(UNITS)):
                    assert abs(abs(signs[i][j]) - 1) < 1e-10
                    assert abs(signs[i][j] * signs[0][0] - signs[i][0] * signs[0][j]) < 1e-9
                assert noise[0] != noise[n]


# --- how long masks last -----------------------------------------------------------------------------------------------------


def test_masks_last_as_long_as_they_say(drawn):
    method = Method(
        embedding=EmbeddingDropout(0.5), inputs=Dropout(0.5), between=Dropout(0.5, per="step"), outputs=Dropout(0.5),
        hidden=Dropout(0.5), update=Dropout(0.5, per="step"),
    )  # fmt: skip
    net = Regularized(Model(), method)
    tokens = torch.randint(WORDS, (ROWS, STEPS))
    net(tokens)
    shapes = [tuple(mask.shape) for mask in drawn]
    layer = [(1, ROWS, UNITS), (STEPS, ROWS, UNITS)]
    assert shapes == [(1, WORDS), (1, ROWS, 4), *layer, (STEPS, ROWS, UNITS), *layer, (1, ROWS, UNITS)]
    net(tokens)
    assert not torch.equal(drawn[1], drawn[len(shapes) + 1])  # anew at each call


def test_a_word_is_dropped_wherever_it_stands():
    net = Regularized(WordLSTM(stream(0), WORDS, UNITS, 1), Method(embedding=EmbeddingDropout(0.5, per="sequence")))
    seen = []
    net.module.lstm.register_forward_pre_hook(lambda part, args: seen.append(args[0].detach()))
    tokens = torch.tensor([[0, 1, 0, 2, 1, 0]] * 8)
    net(tokens)
    dropped = seen[0].abs().sum(2) == 0
    assert torch.equal(dropped[:, 0], dropped[:, 2])
    assert torch.equal(dropped[:, 1], dropped[:, 4])
    assert 0 < dropped[:, 0].sum() < 8  # each sequence has words of its own
    kept = ~dropped[:, 0]
    torch.testing.assert_close(seen[0][kept][:, 0], 2 * net.module.embedding.weight[0].expand(int(kept.sum()), -1))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_have_mean_one(p):
    mask = Dropout(p, per="step").mask(100, 10, 100, like=torch.zeros((), dtype=torch.float64), generator=stream(5))
    error = (p / (1 - p) / mask.numel()) ** 0.5
    assert abs(float(mask.mean()) - 1) < 4 * error
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}


# --- the layers of torch ------------------------------------------------------------------------------------------------------

IDLE = {
    "layer by layer": Method(between=Dropout(0.0)),
    "step by step": Method(hidden=Dropout(0.0)),
    "zones": Method(zoneout=Zoneout(0, 0)),
}


OPTIONS = [{}, {"batch_first": True}, {"bidirectional": True}, {"bias": False}]
LAYERS = [*itertools.product([nn.LSTM, nn.GRU, nn.RNN], OPTIONS), (nn.LSTM, {"proj_size": 3})]


@pytest.mark.parametrize("path", IDLE)
@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=lambda value: value.__name__ if isinstance(value, type) else str(*value))
def test_a_method_that_drops_nothing_is_the_layer(path, kind, options):
    layer = kind(4, UNITS, 2, dtype=torch.float64, **options)
    net = Regularized(layer, IDLE[path])
    for shape in ((STEPS, ROWS, 4), (STEPS, 4)):  # a batch, and a single sequence
        x = torch.randn(shape, dtype=torch.float64)
        _, state = layer(torch.randn(shape, dtype=torch.float64))
        for given in ((x,), (x, state)):
            for mine, own in zip(flat(net(*given)), flat(layer(*given)), strict=True):
                torch.testing.assert_close(mine, own, rtol=0, atol=1e-12)


def flat(output):
    y, state = output
    return [y, *(state if isinstance(state, tuple) else (state,))]


def test_layers_of_a_model_are_a_stack_in_their_order(drawn):
    """Merity's models have one nn.LSTM a layer, of different sizes."""

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.LSTM(4, 5), nn.LSTM(5, 6), nn.LSTM(6, 3)])

        def forward(self, x):
            for layer in self.layers:
                x, _ = layer(x)
            return x

    net = Regularized(Stack(), Method(inputs=Dropout(0.1), between=Dropout(0.2), outputs=Dropout(0.3)))
    net(torch.ones(STEPS, ROWS, 4))
    assert [mask.shape[2] for mask in drawn] == [4, 5, 6, 3]


# --- a wrapper that leaves no trace -------------------------------------------------------------------------------------------

TABLES = {f"{table}-{name}": (table, name) for table, methods in (("char", CHAR), ("word", WORD)) for name in methods}


def language_model(table):
    return CharLSTM(stream(0), WORDS, UNITS) if table == "char" else WordLSTM(stream(0), WORDS, UNITS)


@pytest.mark.parametrize("case", TABLES)
def test_evaluation_is_the_module_and_training_is_random(case):
    table, name = TABLES[case]
    module = language_model(table)
    before, keys = copy.deepcopy(module), list(module.state_dict())
    net = Regularized(module, {"char": CHAR, "word": WORD}[table][name])
    tokens = torch.randint(WORDS, (8, STEPS))
    first, second = net(tokens), net(tokens)
    assert torch.equal(first, second) is (name == "none")
    first.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert list(net.module.state_dict()) == keys
    assert all("forward" not in part.__dict__ for part in module.modules())
    net.eval()
    if name != "zoneout":
        assert torch.equal(net(tokens), before.eval()(tokens))
    with net.sampling():
        assert torch.equal(net(tokens), net(tokens)) is (name == "none")
    with net.drawing(8, stream(1)):
        pass
    assert torch.equal(net(tokens), net(tokens))
    assert isinstance(pickle.loads(pickle.dumps(net)), Regularized)


@pytest.mark.parametrize("case", TABLES)
def test_draws_come_from_the_generator_alone(case):
    table, name = TABLES[case]
    net = Regularized(language_model(table), {"char": CHAR, "word": WORD}[table][name])
    tokens, state, outputs = torch.randint(WORDS, (ROWS, STEPS)), torch.get_rng_state(), []
    for seed in (1, 1, 2):
        with net.drawing(ROWS, stream(seed)):
            outputs.append(net(tokens))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2]) is (name == "none")
    assert net.generator is None


def test_everything_is_put_back_after_an_error():
    net = Regularized(language_model("word"), WORD["wd-flipout"])
    own = net.module.lstm.forward
    with pytest.raises(IndexError):
        net(torch.full((2, 3), WORDS))
    assert "forward" not in net.module.lstm.__dict__
    net.module.lstm.forward = own  # a forward of the user's own comes back as it was
    with net.drawing(2, stream(0)):
        net(torch.zeros(2, 3, dtype=torch.long))
    assert net.module.lstm.__dict__["forward"] == own


@pytest.mark.parametrize("name", ["gal", "semeniuta", "zoneout", "wd-flipout"])
def test_gradients_are_those_of_finite_differences(name):
    module = WordLSTM(stream(0), WORDS, 3).double()
    net = Regularized(module, WORD[name])
    tokens = torch.randint(WORDS, (2, 3))

    def loss(*parameters):
        with net.drawing(2, stream(6)):
            return net(tokens).square().sum()

    assert torch.autograd.gradcheck(loss, tuple(module.parameters()), atol=1e-7)


# --- what cannot be ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dropout(1.0), r"Dropout\(p=1\.0\): expected a probability of dropping"),
        (lambda: Dropout(0.5, per="word"), 'choose "sequence" or "step"'),
        (lambda: EmbeddingDropout(-0.1), r"EmbeddingDropout\(p=-0\.1\)"),
        (lambda: EmbeddingDropout(0.1, per="step"), 'choose "sequence" or "batch"'),
        (lambda: Zoneout(cell=2), r"Zoneout\(cell=2\)"),
        (lambda: Zoneout(hidden=True), r"Zoneout\(hidden=True\)"),
        (lambda: Method(update=Dropout(0.1), zoneout=Zoneout(0.1)), "no paper defines them together"),
        (lambda: Regularized(nn.Linear(2, 2), CHAR["gal"]), "Linear has no nn.LSTM, nn.GRU or nn.RNN"),
        (lambda: Regularized(nn.LSTM(2, 2), WORD["gal"]), "LSTM has no nn.Embedding"),
        (lambda: Regularized(nn.LSTM(2, 2), TRANSFORMER["gal"]), "LSTM has no nn.Embedding|has no nn.Dropout"),
        (lambda: Regularized(nn.LSTM(2, 2), Method(dropouts=Dropout(0.1))), "has no nn.Dropout"),
        (lambda: Regularized(nn.RNN(2, 2), CHAR["semeniuta"]), "is an nn.RNN, which has no gated update"),
        (lambda: Regularized(nn.GRU(2, 2), CHAR["zoneout"]), "is an nn.GRU, which has no cells"),
        (lambda: Regularized(nn.Linear(2, 2), CHAR["gaussian"]), "matches no parameter"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_packed_batches_and_odd_dropouts_are_refused():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    with pytest.raises(ArgumentError, match="got a packed batch"):
        Regularized(nn.LSTM(2, 2), CHAR["gal"])(packed)
    with pytest.raises(ArgumentError, match=r"an nn\.Dropout got a tensor of shape \(2, 3\)"):
        Regularized(nn.Sequential(nn.Dropout(0.1)), Method(dropouts=Dropout(0.1)))(torch.ones(2, 3))
