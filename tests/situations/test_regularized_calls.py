"""Regularized models on time-major tokens, and called from several places at once."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import flipout
from flipout.regularize import TRANSFORMER, WORD, Dropout, EmbeddingDropout, Method, Regularized
from flipout.streams import stream

WORDS, UNITS = 7, 6
PER_SEQUENCE = Method(embedding=EmbeddingDropout(0.5, per="sequence"))
MASKED = Method(embedding=EmbeddingDropout(0.3, per="sequence"), inputs=Dropout(0.3), between=Dropout(0.3), hidden=Dropout(0.3))


class Model(nn.Module):
    def __init__(self, batch_first: bool, transposes: bool = False) -> None:
        super().__init__()
        self.embedding, self.transposes = nn.Embedding(WORDS, 4), transposes
        self.rnn = nn.LSTM(4, UNITS, 2, batch_first=batch_first)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.rnn(x.transpose(0, 1) if self.transposes else x)[0]


def models(**options):
    torch.manual_seed(0)
    first = Model(True).double()
    second = Model(False, **options).double()
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("rows", [3, 5])  # five steps: in the square case no shape tells
@pytest.mark.parametrize("name", WORD)
def test_time_major_tokens_have_the_masks_and_weights_of_their_sequences(name, rows):
    first, second = models()
    tokens = torch.randint(WORDS, (rows, 5), generator=stream(1))
    with torch.no_grad():
        expected = Regularized(first, WORD[name], stream(2))(tokens)
        found = Regularized(second, WORD[name], stream(2))(tokens.T)
    torch.testing.assert_close(found.transpose(0, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["gal", "wd-flipout"])
def test_a_model_that_transposes_inside_says_so(name):
    first, second = models(transposes=True)
    tokens = torch.randint(WORDS, (3, 5), generator=stream(1))
    with torch.no_grad():
        expected = Regularized(first, WORD[name], stream(2))(tokens)
        found = Regularized(second, WORD[name], stream(2), batch_dim=0)(tokens)
        torch.testing.assert_close(found.transpose(0, 1), expected, rtol=0, atol=1e-10)
        with pytest.raises(flipout.BatchError):
            Regularized(second, WORD[name], stream(2))(tokens)


def test_words_are_dropped_from_a_sequence_as_a_whole():
    embedding = nn.Sequential(nn.Embedding(WORDS, 4))
    nn.init.ones_(embedding[0].weight)
    tokens = torch.randint(WORDS, (40, 12), generator=stream(1))
    for batch_dim, x in ((0, tokens), (1, tokens.T)):
        y = Regularized(embedding, PER_SEQUENCE, stream(2), batch_dim=batch_dim)(x).detach().movedim(batch_dim, 0)[..., 0]
        kept = [{(int(word), float(value)) for word, value in zip(*row, strict=True)} for row in zip(tokens, y, strict=True)]
        assert all(len(pairs) == len({word for word, _ in pairs}) for pairs in kept)  # one fate a word and sequence
        assert len({frozenset(pairs) for pairs in kept}) > 30  # and sequences differ


def test_wrong_combinations_are_refused():
    lstm = nn.LSTM(4, UNITS, batch_first=True)
    with pytest.raises(flipout.ArgumentError, match=r"batch_dim=1.*dimension 0 counts.*batch_first=False"):
        Regularized(lstm, WORD["gal"], batch_dim=1)
    for wrong in (-1, True, "0"):
        with pytest.raises(flipout.ArgumentError, match="expected the index of a dimension"):
            Regularized(lstm, Method(inputs=Dropout(0.1)), batch_dim=wrong)
    both = nn.ModuleDict({"a": lstm, "b": nn.GRU(UNITS, 3)})
    with pytest.raises(flipout.ArgumentError, match=r"'a', 'b' differ in batch_first.*batch_dim=0"):
        Regularized(both, Method(noise=flipout.DropConnect(0.5)))
    Regularized(both, Method(inputs=Dropout(0.1)))  # which asks each layer
    _, second = models(transposes=True)
    with pytest.raises(flipout.BatchError, match=r"the words have 5 sequences on batch_dim=1.*got 3.*batch_dim=0"):
        Regularized(second, PER_SEQUENCE_IN_A_RECURRENT_MODEL)(torch.zeros(3, 5, dtype=torch.long))


PER_SEQUENCE_IN_A_RECURRENT_MODEL = Method(embedding=EmbeddingDropout(0.5, per="sequence"), inputs=Dropout(0.1))


def test_dropouts_of_a_time_major_transformer_last_over_its_sequences():
    module = nn.Sequential(nn.Dropout(0.1))
    x = torch.ones(5, 3, 400)
    y = Regularized(module, Method(dropouts=TRANSFORMER["gal"].dropouts), stream(0), batch_dim=1)(x)
    assert all(torch.equal(y[0], each) for each in y)
    assert not torch.equal(y[:, 0], y[:, 1])


# --- Several callers ---------------------------------------------------------------------------------------------------------


def in_threads(*functions):
    found, errors = [None] * len(functions), []

    def call(i, function):
        try:
            found[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i, function)) for i, function in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return found


@torch.no_grad()
def test_threads_have_masks_of_their_own_and_the_plain_module_has_none():
    module, _ = models()
    net = Regularized(module, MASKED)
    tokens = torch.randint(WORDS, (4, 6), generator=stream(1))
    plain = module(tokens)

    def drawn(seed):
        with torch.no_grad(), net.drawing(4, stream(seed)):
            return net(tokens)

    alone = [drawn(seed) for seed in range(3)]

    def many(seed):
        return all(torch.equal(drawn(seed), alone[seed]) for _ in range(30))

    def clean():
        with torch.no_grad():
            return all(torch.equal(module(tokens), plain) for _ in range(100))

    assert in_threads(lambda: many(0), clean, lambda: many(1), lambda: many(2)) == [True] * 4
    assert not any("forward" in part.__dict__ for part in module.modules())


@torch.no_grad()
def test_sampling_in_one_thread_or_task_is_not_seen_in_another():
    module, _ = models()
    net = Regularized(module, MASKED).eval()
    tokens = torch.randint(WORDS, (4, 6), generator=stream(1))
    plain, inside = module(tokens), threading.Event()
    done = threading.Event()

    def samples():
        with torch.no_grad(), net.sampling():
            inside.set()
            done.wait(30)
            return not torch.equal(net(tokens), plain)

    def evaluates():
        inside.wait(30)
        try:
            with torch.no_grad():
                return torch.equal(net(tokens), plain)
        finally:
            done.set()

    assert in_threads(samples, evaluates) == [True, True]

    async def sampling():
        with net.sampling():
            await asyncio.sleep(0)
            found = net(tokens)
            await asyncio.sleep(0)
        return not torch.equal(found, plain)

    async def evaluating():
        await asyncio.sleep(0)
        return torch.equal(net(tokens), plain)

    async def both():
        return await asyncio.gather(sampling(), evaluating())

    assert asyncio.run(both()) == [True, True]
    assert torch.equal(net(tokens), plain)


class Interrupted(nn.Module):
    """Calls back in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.callback = nn.Embedding(WORDS, 4), None

    def forward(self, tokens):
        if self.callback is not None:
            callback, self.callback = self.callback, None
            callback()
        return self.embedding(tokens)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_in_the_middle_of_a_call_is_a_plain_module(duplicate):
    module, copies = Interrupted(), []
    net = Regularized(module, PER_SEQUENCE)
    tokens = torch.randint(WORDS, (4, 6))
    module.callback = lambda: copies.append(duplicate(module))
    net(tokens)
    (found,) = copies
    with torch.no_grad():
        found.embedding.weight += 1
    torch.testing.assert_close(found(tokens), module(tokens) + 1)
    assert not torch.equal(Regularized(found, PER_SEQUENCE, stream(0))(tokens), found(tokens))


def test_an_exception_leaves_nothing_behind():
    module = Interrupted()
    net = Regularized(module, PER_SEQUENCE)

    def fail():
        raise RuntimeError("broken")

    module.callback = fail
    with pytest.raises(RuntimeError, match="broken"):
        net(torch.zeros(2, 3, dtype=torch.long))
    assert not any("forward" in part.__dict__ for part in module.modules())
    with pytest.raises(RuntimeError, match="broken"), net.sampling():
        fail()
    net.eval()
    x = torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(net(x), module(x))


def test_a_forward_that_the_part_had_of_its_own_is_kept():
    module = nn.Sequential(nn.Embedding(WORDS, 4))
    own = module[0].forward
    module[0].forward = lambda tokens: own(tokens) + 100
    before = module[0].forward
    y = Regularized(module, PER_SEQUENCE)(torch.zeros(2, 3, dtype=torch.long))
    assert bool(((y == 0) | (y > 150)).all())
    assert module[0].forward is before


def test_compiled_parts_and_compiled_wrappers_have_their_masks():
    module = nn.Sequential(nn.Embedding(WORDS, 4), nn.Linear(4, 4))
    tokens = torch.randint(WORDS, (4, 6))
    part = torch.compile(module, backend="eager")
    plain = part(tokens)
    inside, outside = Regularized(part, PER_SEQUENCE), torch.compile(Regularized(module, PER_SEQUENCE), backend="eager")
    for net in (inside, outside):
        one, two = net(tokens), net(tokens)
        assert not torch.equal(one, plain)
        assert not torch.equal(one, two)
    torch.testing.assert_close(part(tokens), plain)
    torch.testing.assert_close(outside.eval()(tokens), plain)
