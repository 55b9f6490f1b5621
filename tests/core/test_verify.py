"""flipout.verify: what it passes, what it finds and names, what it puts back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from cases import Case
from laws import EXACT, LISTED, MEMBERS, pair_id, pairs, wrap
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from zoo import ZOO, Entry

import flipout
from flipout import registry
from flipout.errors import ArgumentError, BatchError, DrawError, FlipoutError, VerificationError

NOISE = flipout.Gaussian(0.3)


def wrapped(module: nn.Module, **options: Any) -> flipout.Perturbed:
    return flipout.Perturbed(module.double(), NOISE, generator=torch.Generator().manual_seed(1), **options)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding=.same.:UserWarning")
@pytest.mark.parametrize(("case", "estimator"), pairs(), ids=pair_id)
def test_every_case_passes(case: Case, estimator: str) -> None:
    net = wrap(case, NOISE, LISTED[estimator])
    for n in (MEMBERS, 2 * MEMBERS):
        report = flipout.verify(net, *case.draw_inputs(n), members=MEMBERS)
        assert (report.members, report.rows) == (MEMBERS, n)
        assert report.difference <= EXACT
        assert report.operations > 0
        assert report.met
        assert not report.unmet
        assert not report.unchecked


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT", "T5", "ViT", "Mamba"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_of_hugging_face_pass(name: str) -> None:
    pytest.importorskip("transformers")
    entry: Entry = next(each for each in ZOO if each.name == name)
    net = flipout.Perturbed(entry.make(), flipout.Gaussian(0.1), exclude=entry.exclude)
    report = flipout.verify(net, **entry.inputs(3))
    assert report.members == 3
    assert report.difference < (1e-6 if name in ("Llama", "Mamba") else 1e-12)  # these compute some steps in float32
    assert report.difference <= report.tolerance
    assert report.operations > 20


def test_a_language_models_loss_is_the_mean_of_its_rows() -> None:
    pytest.importorskip("transformers")
    entry = ZOO[0]
    net = flipout.Perturbed(entry.make(), flipout.Gaussian(0.1))
    batch = entry.inputs(3)
    assert not flipout.verify(net, **batch, labels=batch["input_ids"]).unchecked


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("pads", [False, True], ids=["packed", "padded"])
def test_packed_sequences_in_and_out(members: int | None, pads: bool) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x: PackedSequence) -> Any:
            y, (h, _) = self.lstm(x)
            return (pad_packed_sequence(y, batch_first=True)[0] if pads else y), h

    x = pack_padded_sequence(rows(5, 4, 3), torch.tensor([3, 5, 1, 2]), enforce_sorted=False)
    assert flipout.verify(wrapped(Reader()), x, members=members).difference < EXACT


def test_states_of_a_recurrent_layer_have_their_rows_on_axis_1() -> None:
    net = wrapped(nn.LSTM(3, 4, num_layers=2, batch_first=True))
    for n in (2, 4):  # as many rows as layers, and not
        assert flipout.verify(net, rows(n, 5, 3), (rows(2, n, 4), rows(2, n, 4))).difference < EXACT


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Batch:
    values: Tensor
    scale: float


def test_nested_arguments_and_results() -> None:
    class Nested(nn.Linear):
        def forward(self, x: Tensor, more: dict[str, Any], batch: Batch, bias: Tensor) -> Any:  # type: ignore[override]
            y = super().forward(x + more["pair"].left * batch.scale + batch.values) + bias
            return {"first": [y, Batch(2 * y, 1.0)], "pair": Pair(y.sum(1), y.argmax(1)), "number": 3, "bias": bias}

    x = rows(4, 3)
    report = flipout.verify(wrapped(Nested(3, 2)), x, {"pair": Pair(x, x)}, batch=Batch(x, 0.5), bias=rows(2))
    assert report.difference < EXACT
    assert not report.unchecked


def test_rows_that_are_the_inner_index_of_a_folded_output() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].flatten(0, 1))  # [T * N, features]

    for members in (None, 3):
        assert flipout.verify(wrapped(Folded(), batch_dim=1), rows(5, 6, 3), members=members).difference < EXACT


def test_one_row_and_an_input_without_a_batch_dimension() -> None:
    assert flipout.verify(wrapped(nn.Linear(3, 2)), rows(1, 3)).members == 1
    assert flipout.verify(wrapped(nn.Linear(3, 2)), rows(3)).members == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tolerance_goes_by_dtype(dtype: torch.dtype) -> None:
    net = flipout.Perturbed(nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype), flipout.Gaussian(0.1))
    report = flipout.verify(net, rows(4, 30).to(dtype))
    assert report.tolerance == {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    with torch.autocast("cpu", torch.bfloat16):
        assert flipout.verify(net, rows(4, 30).to(dtype)).tolerance == 0.05
    with pytest.raises(VerificationError, match=r"tolerance 1e-12"):
        flipout.verify(net, rows(4, 30).to(dtype), tolerance=1e-12)


def test_the_report_reads_well() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.used(x)
            return y, y.std()

    report = flipout.verify(wrapped(Spare(), unmet="ignore"), rows(4, 3))
    assert report.met == ("used.weight", "used.bias")
    assert report.unmet == ("spare.weight", "spare.bias")
    assert report.unchecked == ("[1]",)
    text = str(report)
    assert "each of 4 rows is that of the plain module with its member's weights (4 members)" in text
    assert "perturbed parameters that met one: 2 of 4" in text
    assert "without effect in this call: spare.weight, spare.bias" in text
    assert "not compared, since they have no rows: [1]" in text


def test_cost_is_two_calls_and_one_a_member() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    flipout.verify(wrapped(Counted(3, 2)), rows(6, 3))
    assert calls == [6, 6] + [1] * 6


# --- what it finds ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.outer(x, self.weight)


def dense(x: Tensor, weight: Any) -> Tensor:
    """The weight of each row."""
    found: Tensor = weight.dense()
    return found.repeat_interleave(len(x) // len(found), 0)


WRONG: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "others' rows": lambda x, weight: (x[:, None] * dense(x, weight)).flip(0),
    "others' weights": lambda x, weight: x[:, None] * dense(x, weight).flip(0),
    "the mean": lambda x, weight: x[:, None] * weight.mean_weight,
}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("members", [2, 4])
def test_a_wrong_rule_is_named(rules: None, wrong: str, members: int) -> None:
    flipout.rule(torch.outer, flipout.Flipout)(WRONG[wrong])
    net = wrapped(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0), Outer(), nn.Linear(3, 3)))
    with pytest.raises(VerificationError, match=r"of member \d") as caught:
        flipout.verify(net, rows(4, 2), members=members)
    assert "first operation whose rows went astray is torch.outer in '2' (arguments of shape (4,), (3,))" in str(caught.value)


def test_a_right_rule_passes(rules: None) -> None:
    flipout.rule(torch.outer, flipout.Flipout)(lambda x, weight: x[:, None] * weight.dense())
    assert flipout.verify(wrapped(nn.Sequential(nn.Flatten(0), Outer())), rows(4, 1)).difference < EXACT


def test_a_wrong_rule_after_rows_were_sorted_is_named(rules: None) -> None:
    """A legitimate permutation before the operation is not blamed."""
    flipout.rule(torch.outer, flipout.Flipout)(WRONG["the mean"])

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()

        def forward(self, x: Tensor) -> Tensor:
            order = x.argsort()
            return self.outer(x[order])[order.argsort()]

    with pytest.raises(VerificationError, match=r"went astray is torch.outer in 'outer'"):
        flipout.verify(wrapped(Sorted()), rows(4))


class Mixing(nn.Module):
    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.how = nn.Linear(3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.body(x))


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda y: y - y.mean(0), "torch.Tensor.mean in 'Mixing'"),
        (lambda y: F.softmax(y, 0), "torch.nn.functional.softmax in 'Mixing'"),
        (lambda y: F.batch_norm(y, None, None, training=True), "torch.nn.functional.batch_norm in 'Mixing'"),
        (lambda y: y.cumsum(0), "torch.Tensor.cumsum in 'Mixing'"),
        (lambda y: (y @ y.t()).softmax(1) @ y, "torch.Tensor.matmul in 'Mixing'"),
    ],
    ids=["centred", "softmax", "batch_norm", "cumsum", "attention"],
)
def test_a_module_that_mixes_rows_is_named(how: Callable[[Tensor], Tensor], named: str) -> None:
    net = wrapped(Mixing(how))
    with pytest.raises(VerificationError, match="the plain Mixing is not independent row by row") as caught:
        flipout.verify(net, rows(4, 3), members=2)
    assert named in str(caught.value)


def test_a_module_that_cannot_take_one_row_alone_is_told_so() -> None:
    net = wrapped(Mixing(lambda y: F.batch_norm(y, None, None, training=True)))
    with pytest.raises(VerificationError, match=r"cannot run on row 0 alone.* in torch.nn.functional.batch_norm in 'Mixing'"):
        flipout.verify(net, rows(4, 3))


def test_nothing_to_compare() -> None:
    with pytest.raises(VerificationError, match="nothing that has rows"):
        flipout.verify(wrapped(Mixing(lambda y: y.std())), rows(4, 3))


def test_random_numbers_in_evaluation_mode_are_named() -> None:
    net = wrapped(Mixing(lambda y: F.dropout(y, 0.5, training=True)))
    with pytest.raises(VerificationError, match=r"draws random numbers.*dropout in 'Mixing'"):
        flipout.verify(net, rows(4, 3))


def test_a_module_that_is_not_deterministic_is_named() -> None:
    with pytest.raises(VerificationError, match=r"two copies of the plain module differ as well.*Tensor.mul in 'Mixing'"):
        flipout.verify(wrapped(Mixing(lambda y: y * random.random())), rows(4, 3))


class Stateful(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.last: list[float] = []
        self.scale = torch.ones(3, dtype=torch.float64)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * self.scale
        self.count += 1  # type: ignore[operator]
        self.last.append(1.0)
        self.scale += 1
        self.trace = y
        return y


def test_a_stateful_module_is_named() -> None:
    with pytest.raises(VerificationError, match=r"keeps a state from one call to the next.*Tensor.mul in 'Stateful'"):
        flipout.verify(wrapped(Stateful()), rows(4, 3))


def test_a_state_without_effect_passes() -> None:
    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = super().forward(x)
            return self.last

    module = Remembers(3, 2)
    assert flipout.verify(wrapped(module), rows(4, 3)).difference < EXACT
    assert not hasattr(module, "last")


def test_arguments_that_cannot_be_split() -> None:
    class Sizes(nn.Linear):
        def forward(self, x: Tensor, sizes: list[int]) -> Tensor:  # type: ignore[override]
            return torch.cat([super(Sizes, self).forward(piece) for piece in x.split(sizes)])

    with pytest.raises(VerificationError, match=r"cannot run on row 0 alone.*were split") as caught:
        flipout.verify(wrapped(Sizes(3, 2)), rows(4, 3), [1, 1, 2])
    assert isinstance(caught.value.__cause__, RuntimeError)


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [flipout.LocalReparameterization(), flipout.Flipout(per_step=True), flipout.Flipout(granularity="token")],
    ids=str,
)
def test_estimators_without_members_say_what_to_verify_with(estimator: flipout.Estimator) -> None:
    net = wrapped(nn.Linear(3, 2), estimator=estimator)
    with pytest.raises(DrawError, match=r"net\.using\(flipout\.Flipout\(\)\)"):
        flipout.verify(net, rows(4, 3))
    with net.using(flipout.Flipout()):
        assert flipout.verify(net, rows(4, 3)).members == 4


def test_bad_arguments() -> None:
    net = wrapped(nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match=r"takes a flipout\.Perturbed, got Linear"):
        flipout.verify(net.module, rows(4, 3))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="tolerance=0"):
        flipout.verify(net, rows(4, 3), tolerance=0)
    with pytest.raises(ArgumentError, match="members=0"):
        flipout.verify(net, rows(4, 3), members=0)
    with pytest.raises(BatchError, match="do not divide"):
        flipout.verify(net, rows(4, 3), members=3)
    with pytest.raises(BatchError, match="no rows"):
        flipout.verify(net, rows(0, 3))
    with pytest.raises(DrawError, match="already held"), net.hold(4):
        flipout.verify(net, rows(4, 3))
    with pytest.raises(ArgumentError, match="no numbers to compare"):
        flipout.verify(flipout.Perturbed(nn.Linear(3, 2, device="meta"), NOISE), torch.empty(4, 3, device="meta"))


# --- what it puts back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["passes", "fails", "raises"])
def test_everything_is_put_back(ending: str) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if ending == "raises":
                raise KeyError("broken")
            return x - x.mean(0) if ending == "fails" else x

    stateful = Stateful()
    if ending == "passes":
        stateful.forward = lambda x: F.linear(x, stateful.weight, stateful.bias)  # type: ignore[method-assign]
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), nn.BatchNorm1d(3), Failing())
    if ending == "fails":
        module.append(stateful)
    net = wrapped(module)
    net.module[2].eval()  # a frozen part of a net in training mode
    random_state, generator_state = torch.get_rng_state(), net.generator.get_state()  # type: ignore[union-attr]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    identities = {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())}
    modes = {name: part.training for name, part in net.named_modules()}
    scale = stateful.scale

    if ending == "passes":
        flipout.verify(net, rows(4, 3))
    else:
        with pytest.raises((FlipoutError, KeyError)):
            flipout.verify(net, rows(4, 3))

    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(net.generator.get_state(), generator_state)  # type: ignore[union-attr]
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert {name: id(value) for name, value in (*net.named_parameters(), *net.named_buffers())} == identities
    assert {name: part.training for name, part in net.named_modules()} == modes
    assert stateful.last == []
    assert stateful.scale is scale
    assert torch.equal(scale, torch.ones(3, dtype=torch.float64))
    assert not hasattr(stateful, "trace")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    with net.hold(4):  # nothing is held any more
        pass


def test_inputs_are_left_alone() -> None:
    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    x = rows(4, 3)
    before = x.clone()
    assert flipout.verify(wrapped(Writes(3, 2)), x).difference < EXACT
    assert torch.equal(x, before)
