"""What seldom happens: uses that have no meaning are refused by name, and rare ways to the same result give the same result."""

import sys

import pytest
import torch
from torch import nn

import flipout
from flipout import bayes, variance
from flipout.errors import BatchError, DrawError, MissingRuleError
from flipout.reference import loop_forward
from flipout.variance.variance_table import table


class Use(nn.Module):
    """A module that does one thing with its matrix [out, in] or stack of matrices."""

    def __init__(self, function, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(shape[-2], dtype=torch.float64))
        self.function = function

    def forward(self, x):
        return self.function(x, self.weight, self.bias)


TOKENS = flipout.Flipout(granularity="token")
REFUSED = {
    "a vector without rows": (lambda x, w, b: w @ x[0], (4, 3), {}, BatchError, "'weight' .*has no batch dimension"),
    "a vector along the rows": (lambda x, w, b: torch.addmm(b, w, x.t()), (4, 3), {}, BatchError, "make it a column"),
    "a stack": (lambda x, w, b: torch.bmm(x.expand(2, 5, 3), w), (2, 3, 3), {}, BatchError, "bmm met the stack .*'weight'"),
    "a stack of one": (lambda x, w, b: torch.bmm(x[None], w.mT)[0], (1, 4, 3), {}, BatchError, "Use matmul on"),
    "entries per token": (
        lambda x, w, b: x @ w.exp().t(), (4, 3), {"estimator": TOKENS}, (DrawError, MissingRuleError), "weight",
    ),
    "a loop per token": (
        lambda x, w, b: torch.linalg.qr(w)[0], (4, 3),
        {"estimator": TOKENS, "fallback": "loop"}, MissingRuleError, "at least one member",
    ),
    "an output given": (
        lambda x, w, b: torch.mm(x, w.t(), out=x.new_empty(5, 4)), (4, 3), {}, MissingRuleError, "out= would write",
    ),
    "no rows in the result": (lambda x, w, b: w, (4, 3), {}, BatchError, "returned the perturbed weight 'weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(case):
    function, shape, options, error, message = REFUSED[case]
    net = flipout.Perturbed(Use(function, *shape), flipout.Gaussian(0.1), **options)
    with pytest.raises(error, match=message):
        net(torch.randn(5, 3, dtype=torch.float64))


SERVED = {
    "addmm of matrices": (lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=2.0), (4, 3)),
    "addmm of a column": (lambda x, w, b: torch.addmm(b[:, None], w, x.t(), beta=0.5).t(), (4, 3)),
}


@pytest.mark.parametrize("case", SERVED)
def test_rare_products_are_their_members(case):
    function, shape = SERVED[case]
    net = flipout.Perturbed(Use(function, *shape), flipout.Gaussian(0.1))
    x = torch.randn(5, 3, dtype=torch.float64)
    with net.hold(5) as draw, torch.no_grad():
        torch.testing.assert_close(net(x), loop_forward(net.module, draw, x), atol=1e-12, rtol=0)


def test_a_few_fresh_signs_among_many_that_are_packed(monkeypatch):
    """Many signs are kept as bits and few as numbers: a draw of the one kind takes fresh signs of the other."""
    monkeypatch.setattr("flipout.estimators._FEW_SIGNS", 20)
    net = flipout.Perturbed(nn.Linear(3, 4).double(), flipout.Gaussian(0.3), generator=torch.Generator().manual_seed(0))
    x = torch.randn(8, 3, dtype=torch.float64)
    with net.hold(8) as draw, torch.no_grad():
        before = [draw.weights(n)["weight"] for n in range(8)]
        draw.resample([2, 5])
        after = [draw.weights(n)["weight"] for n in range(8)]
        changed = [n for n in range(8) if not torch.equal(before[n], after[n])]
        assert set(changed) <= {2, 5}
        assert changed
        torch.testing.assert_close(net(x), loop_forward(net.module, draw, x), atol=1e-12, rtol=0)


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(flipout.ArgumentError, match=r"needs pandas, which is not installed: pip install pandas, or use as_dict"):
        table([{"a": 1}])
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(flipout.ArgumentError, match=r"needs torchmetrics, .*: pip install 'flipout\[bayes\]'"):
        bayes.accuracy(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))


def test_measurements_are_refused_before_they_begin():
    calls = []

    def sample(n, generator):
        calls.append(n)
        return torch.randn(n, 2, generator=generator)

    def loss(net, x):
        return net(x).square().mean()

    net = flipout.Perturbed(nn.Linear(2, 1), flipout.Gaussian(0.1))
    for measure, more in (
        (variance.gradient_variance, ()),
        (variance.variance_curve, ((1, 2),)),
        (variance.variance_components, ()),
    ):
        for options, message in (
            ({"confidence": 1.0}, "confidence=1.0: expected a probability"),
            ({"seed": -1}, "seed=-1"),
            ({"parts": {"weight": ("weight", slice(0, 1))}}, "expected a new name and one of weight, bias"),
            ({"parts": {"head": ("weight", slice(5, 9))}}, "has no rows"),
        ):
            with pytest.raises(flipout.ArgumentError, match=message):
                measure(net, loss, sample, *more, **options)
        with pytest.raises(flipout.ArgumentError, match="wrap the module with its noise first"):
            measure(net.module, loss, sample, *more)
    assert not calls


def test_laws_tell_what_they_are():
    assert repr(bayes.ScaleMixture(0.5, 1.0, 0.1)) == "ScaleMixture(0.5, 1.0, 0.1)"
    assert repr(bayes.LogUniform()) == "LogUniform()"
    net = flipout.Perturbed(nn.Linear(2, 1), flipout.Gaussian(0.1))
    assert "2 parameters" in repr(net)
    assert "Flipout" in repr(net)
