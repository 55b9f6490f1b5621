"""No operation drops noise in silence: every torch function without a rule raises, and so does a weight in the wrong place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import get_testing_overrides, resolve_name
from torch.testing._internal.generated.annotated_fn_args import annotated_args

import flipout
from flipout.registry import rules
from flipout.weight import METADATA

pytestmark = pytest.mark.filterwarnings("ignore")  # many of the functions are deprecated


def carrier(*shape: int, rows: int = 4, estimator: flipout.Estimator = flipout.Flipout()) -> flipout.PerturbedWeight:  # noqa: B008
    """A weight as the operations of a module meet it."""
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.w = nn.Parameter(torch.randn(shape))
    (weight,) = flipout.Perturbed(module, flipout.Gaussian(0.1), estimator).draw(rows).carriers(rows, 0)
    assert isinstance(weight, flipout.PerturbedWeight)
    return weight


# --- every overridable function ---------------------------------------------------------------------------------------

RULED = {operation for operation, _ in rules()}

#: Functions that no weight can reach by position, each with the reason.
UNREACHED = {
    "torch.functional.einsum": "takes its equation first; see WRONG_PLACES",
    "torch.Tensor.record_stream": "takes a stream before it looks at tensors",
    "torch.Tensor.set_": "refuses leaves that require a gradient before it dispatches",
    "torch.Tensor._grad_fn.__get__": "reads metadata",
    "torch.Tensor.polygamma": "takes its order first",
}


def _value(kind: str, size: Any, w: Tensor) -> Any:
    if kind == "Tensor":
        return w
    if "Tensor" in kind:
        return [w, w]
    if "IntArrayRef" in kind:
        return [1] * int(size or 2)
    if "Dimname" in kind:  # older releases list the overload with named dimensions
        return ["n"] if "List" in kind else "n"
    named = {"int64_t": 1, "SymInt": 1, "bool": True, "ScalarType": torch.float32, "double": 0.5, "Scalar": 0.5}
    return named.get(kind, "sum" if "string" in kind else 1.0)


def _arguments(function: Callable[..., Any], signature: Callable[..., Any], w: Tensor) -> tuple[list[Any], dict[str, Any]]:
    """The weight for every tensor that the function requires, and something valid for all else."""
    if function not in annotated_args:
        spec = inspect.getfullargspec(signature)
        required = len(spec.args) - len(spec.defaults or ())
        return [w] * max(required, 1), {}
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for argument in annotated_args[function]:
        kind = argument["simple_type"]
        value = None if kind.endswith("?") else _value(kind, argument.get("size"), w)
        if str(argument.get("is_kwarg_only")) == "True":
            named[argument["name"]] = value
        else:
            positional.append(value)
    return positional, named


UNRULED = {f: signature for f, signature in get_testing_overrides().items() if f not in RULED and f not in METADATA}


def test_every_function_without_a_rule_raises() -> None:
    w = carrier(4, 3)
    silent = []
    for function, signature in UNRULED.items():
        name = resolve_name(function) or str(function)
        positional, named = _arguments(function, signature, w)
        try:
            function(*positional, **named)
        except flipout.MissingRuleError:
            continue
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            outcome = "returned"
        if name not in UNREACHED:
            silent.append(f"{name} {outcome[:120]}")
    assert not silent, "\n".join(silent)
    assert len(UNRULED) > 1000


INPLACE = [f for f in UNRULED if (getattr(f, "__name__", "").endswith("_") and not getattr(f, "__name__", "").endswith("__"))]


def test_in_place_operations_are_among_them() -> None:
    names = {getattr(f, "__name__", "") for f in INPLACE}
    assert {"addcmul_", "pow_", "zero_", "fill_", "clamp_", "normal_", "detach_", "requires_grad_"} <= names
    assert not {f for f in RULED if f in INPLACE}


def test_the_error_says_what_where_and_what_to_do() -> None:
    net = flipout.Perturbed(nn.Sequential(nn.Linear(3, 2)), flipout.Gaussian(0.1))
    net.module[0].forward = lambda x: torch.addbmm(x, net.module[0].weight[None], x[None])
    with pytest.raises(flipout.MissingRuleError) as caught:
        net(torch.ones(4, 3))
    message = str(caught.value)
    for part in ("addbmm", "'0.weight'", "(4, 3)", "exclude='0.weight'", "@flipout.rule", 'fallback="loop"', "Flipout"):
        assert part in message
    assert isinstance(caught.value, flipout.FlipoutError)
    assert isinstance(caught.value, NotImplementedError)


# --- weights in the wrong place ---------------------------------------------------------------------------------------

X = torch.randn(4, 3)
INDEX = torch.zeros(4, 3, dtype=torch.long)

WRONG_PLACES: dict[str, Callable[[Any], Any]] = {
    "matmul of two": lambda w: w @ w.t(),
    "conv of a weight": lambda w: F.conv1d(w[None], torch.randn(2, 4, 1)),
    "bilinear of a weight": lambda w: F.bilinear(w, X, torch.randn(2, 3, 3)),
    "group_norm of a weight": lambda w: F.group_norm(w, 1),
    "instance_norm of a weight": lambda w: F.instance_norm(w[None]),
    "batch_norm of a weight": lambda w: F.batch_norm(w, torch.zeros(3), torch.ones(3)),
    "batch_norm statistics": lambda w: F.batch_norm(X, w[0], torch.ones(3)),
    "prelu of a weight": lambda w: F.prelu(w, torch.ones(1)),
    "embedding by a weight": lambda w: F.embedding(w, X),
    "embedding with max_norm": lambda w: F.embedding(INDEX, w, max_norm=1.0),
    "embedding_bag by a weight": lambda w: F.embedding_bag(w, X),
    "embedding_bag weights": lambda w: F.embedding_bag(INDEX, X, per_sample_weights=w, mode="sum"),
    "index by a weight": lambda w: X[w],
    "index by a weight and a number": lambda w: X[w, 0],
    "index_select by a weight": lambda w: X.index_select(0, w[0]),
    "boolean mask of a weight": lambda w: w[X > 0],
    "two index tensors": lambda w: w[INDEX[0], INDEX[0]],
    "assignment into data": lambda w: X.clone().__setitem__(0, w[0]),
    "assignment into a weight": lambda w: w.__setitem__(0, X[0]),
    "augmented weight": lambda w: w.__imul__(2),
    "add out": lambda w: torch.add(w, 1, out=torch.empty(4, 3)),
    "matmul out": lambda w: torch.matmul(X, w.t(), out=torch.empty(4, 4)),
    "power of two weights": lambda w: w**w,
    "power by data": lambda w: w ** X.unsqueeze(1),
    "weight as exponent": lambda w: X.abs() ** w,
    "number to a weight": lambda w: 2.0**w,
    "division with rounding": lambda w: torch.div(w, 2, rounding_mode="floor"),
    "cast to whole numbers": lambda w: w.to(torch.int64),
    "view as bits": lambda w: w.view(torch.int32),
    "cat with data": lambda w: torch.cat([X, w]),
    "stack": lambda w: torch.stack([w, w]),
    "where": lambda w: torch.where(X > 0, w, X),
    "einsum of data alone": lambda w: torch.einsum("ni,oi,oi->no", X, w, w),
    "softmax": lambda w: w.softmax(-1),
    "sum": lambda w: w.sum(),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "comparison": lambda w: w == w,
    "truth": lambda w: bool(w[0, 0]),
    "float": lambda w: float(w[0, 0]),
    "item": lambda w: w[0, 0].item(),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy(),
    "numpy.asarray": lambda w: np.asarray(w),
    "data": lambda w: w.data,
    "grad": lambda w: w.grad,
    "setting data": lambda w: setattr(w, "data", X),
    "setting requires_grad": lambda w: setattr(w, "requires_grad", False),
    "torch.tensor": lambda w: torch.tensor(w),
    "Parameter": lambda w: nn.Parameter(w),
    "deepcopy": lambda w: __import__("copy").deepcopy(w),
    "as_strided": lambda w: w.as_strided((2,), (1,)),
    "aten directly": lambda w: torch.ops.aten.mm(X, w.t()),
    "aten overload": lambda w: torch.ops.aten.add.Tensor(X, w),
    "backward": lambda w: w.backward(),
    "expand_as in vmap": lambda w: torch.vmap(lambda row: row * 2)(w),
}


#: Functions of weights alone, which have a meaning where members' weights are listed.
OF_WEIGHTS = frozenset(
    """matmul of two/conv of a weight/group_norm of a weight/instance_norm
of a weight/batch_norm of a weight/prelu of a weight/two index tensors/power of two weights/number to a weight/division
with rounding/stack/where/softmax/sum/norm/comparison/as_strided""".replace("\n", " ").split("/")
)


@pytest.mark.parametrize("place", sorted(OF_WEIGHTS))
def test_a_function_of_weights_alone_is_a_weight_under_independent(place: str) -> None:
    result = WRONG_PLACES[place](carrier(4, 3, estimator=flipout.Independent()))
    assert type(result) is flipout.PerturbedWeight


@pytest.mark.parametrize("place", WRONG_PLACES)
@pytest.mark.parametrize("estimator", [flipout.Flipout(), flipout.Independent(), flipout.LowRank()], ids=str)
def test_a_weight_in_the_wrong_place_raises(place: str, estimator: flipout.Estimator) -> None:
    if place in OF_WEIGHTS and isinstance(estimator, flipout.Independent):
        return
    with pytest.raises(flipout.MissingRuleError, match=r"'inner\.w'"):
        WRONG_PLACES[place](carrier(4, 3, estimator=estimator))


METADATA: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "shape": (lambda w: w.shape, (4, 3)),
    "size": (lambda w: w.size(0), 4),
    "dim": (lambda w: w.dim(), 2),
    "ndim": (lambda w: w.ndim, 2),
    "numel": (lambda w: w.numel(), 12),
    "torch.numel": (lambda w: torch.numel(w), 12),
    "len": (lambda w: len(w), 4),
    "stride": (lambda w: w.stride(), (3, 1)),
    "dtype": (lambda w: w.dtype, torch.float32),
    "device": (lambda w: w.device, torch.device("cpu")),
    "requires_grad": (lambda w: w.requires_grad, True),
    "is_floating_point": (lambda w: w.is_floating_point(), True),
    "torch.is_tensor": (lambda w: torch.is_tensor(w), True),
    "isinstance": (lambda w: isinstance(w, torch.Tensor), True),
    "is_contiguous": (lambda w: w.is_contiguous(), True),
    "element_size": (lambda w: w.element_size(), 4),
    "to data": (lambda w: X.to(w).dtype, torch.float32),
    "data in its shape": (lambda w: X.reshape(-1).view_as(w).shape, (4, 3)),
}


@pytest.mark.parametrize("read", METADATA)
def test_metadata_reads_as_the_means(read: str) -> None:
    function, expected = METADATA[read]
    assert function(carrier(4, 3)) == expected
    assert type(function(carrier(4, 3))) is not flipout.PerturbedWeight


def test_a_weight_prints_what_it_is() -> None:
    text = repr(carrier(4, 3))
    assert "inner.w" in text
    assert "(4, 3)" in text


def test_arguments_by_name() -> None:
    """Rules take the names that torch gives the arguments."""
    w = carrier(3, 2)
    for result in (
        torch.matmul(input=X, other=w),
        torch.mm(input=X, mat2=w),
        torch.addmm(torch.zeros(2), mat1=X, mat2=w),
        F.linear(input=X, weight=w.t(), bias=None),
        torch.mul(input=X[:, :2], other=w[0]),
        torch.add(input=X[:, :2], other=w[0]),
        torch.sub(input=X[:, :2], other=w[0]),
        torch.div(input=X[:, :2], other=w[0]),
        F.embedding(input=INDEX, weight=w),
        torch.matmul(X, w, out=None),
    ):
        assert type(result) is Tensor
        assert result.shape[0] == 4
