"""Which parameters are perturbed, along which axes signs vary, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import flipout
from flipout.select import check_generator, select


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) * self.scale


def names(**options: object) -> list[str]:
    noise = options.pop("noise", flipout.Gaussian(0.1))
    return list(flipout.Perturbed(Net(), noise, **options).noises)  # type: ignore[arg-type]


ALL = ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight", "head.bias", "scale"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"include": "*weight"}, ["body.0.weight", "body.2.weight", "head.weight"]),
        ({"include": ["head.*", "scale"]}, ["head.weight", "head.bias", "scale"]),
        ({"exclude": "*bias"}, ["body.0.weight", "body.2.weight", "head.weight", "scale"]),
        ({"include": "body.*", "exclude": ("*.0.*", "*bias")}, ["body.2.weight"]),
        ({"include": "body.?.bias"}, ["body.0.bias", "body.2.bias"]),
        ({"include": iter(["scale"])}, ["scale"]),
        ({"noise": {"head.*": flipout.Rademacher(0.1), "scale": flipout.Gaussian(0.2)}}, ["head.weight", "head.bias", "scale"]),
    ],
)
def test_patterns_choose(options: dict[str, object], expected: list[str]) -> None:
    assert sorted(names(**dict(options))) == sorted(expected)


def test_the_first_pattern_of_noise_wins() -> None:
    loud, quiet = flipout.Gaussian(1.0), flipout.Gaussian(0.1)
    noises = flipout.Perturbed(Net(), {"*.weight": loud, "*": quiet}).noises
    assert {name for name, noise in noises.items() if noise is loud} == {n for n in ALL if n.endswith("weight")}
    assert {name for name, noise in noises.items() if noise is quiet} == {n for n in ALL if not n.endswith("weight")}


def test_what_is_excluded_stays_still() -> None:
    net = flipout.Perturbed(Net(), flipout.Gaussian(0.1), exclude="head.*")
    with net.hold(2) as draw:
        assert "head.weight" not in draw.weights(0)
        assert torch.equal(draw.module(1).head.weight, net.module.head.weight)


def test_a_tied_parameter_answers_to_all_its_names() -> None:
    net = Net()
    net.head.weight = nn.Parameter(torch.randn(4, 4))
    net.body[0].weight = net.head.weight
    net.head.bias = nn.Parameter(torch.zeros(4))
    assert list(flipout.Perturbed(net, flipout.Gaussian(0.1), include="head.weight").noises) == ["body.0.weight"]
    assert "body.0.weight" not in flipout.Perturbed(net, flipout.Gaussian(0.1), exclude="head.weight").noises


@pytest.mark.parametrize(
    ("module", "axes"),
    [
        (nn.Linear(3, 4), (0, 1)),
        (nn.Conv2d(3, 4, 2), (0, 1)),
        (nn.Conv2d(1, 1, 2), (0, 1)),
        (nn.ConvTranspose1d(3, 4, 2), (0, 1)),
        (nn.Embedding(3, 4), (1,)),
        (nn.EmbeddingBag(3, 4), (1,)),
        (nn.Bilinear(3, 4, 2), (0, 1)),
        (nn.LayerNorm(3), (0,)),
    ],
    ids=str,
)
def test_signs_vary_along_channels_and_never_along_taps(module: nn.Module, axes: tuple[int, ...]) -> None:
    assert select(module, flipout.Gaussian(0.1), "weight", ())[0].axes == axes


def test_a_table_tied_to_a_layer_keeps_to_the_axes_of_both() -> None:
    module = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    module[1].weight = module[0].weight
    assert select(module, flipout.Gaussian(0.1), "*", ())[0].axes == (1,)


# --- bad input --------------------------------------------------------------------------------------------------------


def refuses(match: str, module: nn.Module | None = None, noise: object = None, **options: object) -> None:
    module = module or Net()
    before = {name: id(p) for name, p in module.named_parameters()}
    with pytest.raises(flipout.ArgumentError, match=match) as caught:
        flipout.Perturbed(module, flipout.Gaussian(0.1) if noise is None else noise, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, flipout.FlipoutError)
    assert isinstance(caught.value, ValueError)
    assert {name: id(p) for name, p in module.named_parameters()} == before


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_the_nearest(kind: str) -> None:
    refuses(rf"{kind} pattern 'head\.wieght' matches no parameter; the nearest names are 'head\.weight'", **{kind: "head.wieght"})


def test_a_pattern_of_noise_that_matches_nothing_names_the_nearest() -> None:
    refuses(
        r"noise pattern 'haed\.\*' matches no parameter; the nearest names are .*'head\.", noise={"haed.*": flipout.Gaussian(0.1)}
    )


def test_nothing_left_to_perturb() -> None:
    refuses("nothing to perturb", exclude="*")
    refuses("nothing to perturb", module=nn.ReLU())
    refuses("nothing to perturb", noise={})


def test_parameters_that_are_no_real_numbers() -> None:
    module = nn.Module()
    module.codes = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    refuses(r"parameter 'codes' has dtype torch\.int64.*exclude='codes'", module=module)
    module.codes = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    refuses(r"parameter 'codes' has dtype torch\.complex64", module=module)
    module.other = nn.Parameter(torch.zeros(3))
    assert list(flipout.Perturbed(module, flipout.Gaussian(0.1), exclude="codes").noises) == ["other"]


def test_a_lazy_module_is_run_first() -> None:
    refuses("not initialised yet; run the module once", module=nn.LazyLinear(3))


@pytest.mark.parametrize("noise", [0.1, "gaussian", flipout.Gaussian, {"*": 0.1}])
def test_a_noise_is_a_noise(noise: object) -> None:
    refuses("expected a flipout noise such as", noise=noise)


@pytest.mark.parametrize("pattern", [3, [1, 2], None])
def test_a_pattern_is_text(pattern: object) -> None:
    with pytest.raises((flipout.ArgumentError, TypeError)):
        flipout.Perturbed(Net(), flipout.Gaussian(0.1), include=pattern)  # type: ignore[arg-type]


def test_a_module_is_a_module() -> None:
    with pytest.raises(flipout.ArgumentError, match=r"expected a torch\.nn\.Module, got function"):
        flipout.Perturbed(lambda x: x, flipout.Gaussian(0.1))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_dim", [-1, 1.0, True, "0", None])
def test_a_batch_dimension_is_an_index(batch_dim: object) -> None:
    refuses("expected the index of a dimension", batch_dim=batch_dim)


@pytest.mark.parametrize("fallback", ["Loop", True, "dense"])
def test_a_fallback_is_none_or_loop(fallback: object) -> None:
    refuses('expected None or "loop"', fallback=fallback)


@pytest.mark.parametrize("generator", [0, "cpu", torch.float64])
def test_a_generator_is_a_generator(generator: object) -> None:
    refuses(r"expected a torch\.Generator or None", generator=generator)
    net = flipout.Perturbed(Net(), flipout.Gaussian(0.1))
    with pytest.raises(flipout.ArgumentError, match=r"expected a torch\.Generator"), net.hold(2, generator):  # type: ignore[arg-type]
        pytest.fail("entered")


def test_a_generator_lives_where_the_parameters_do() -> None:
    there: Any = SimpleNamespace(name="weight", mean=SimpleNamespace(device=torch.device("cuda", 0)))
    with pytest.raises(flipout.ArgumentError, match="the generator lives on cpu, parameter 'weight' on cuda:0"):
        check_generator(torch.Generator(), [there])
    flipout.Perturbed(nn.Linear(2, 2, device="meta"), flipout.Gaussian(0.1), generator=torch.Generator())  # offloaded


@pytest.mark.parametrize("std", [-0.1, 0.0, math.nan, math.inf])
def test_the_scale_of_a_noise_is_refused_before_the_module_is_seen(std: float) -> None:
    module = Net()
    with pytest.raises(flipout.ArgumentError, match="positive and finite"):
        flipout.Perturbed(module, flipout.Gaussian(std))
    assert all(type(p) is nn.Parameter for p in module.parameters())


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_call_without_a_tensor_or_without_its_dimension() -> None:
    net = flipout.Perturbed(Net(), flipout.Gaussian(0.1))
    with pytest.raises(flipout.BatchError, match="called without a tensor"):
        net(3.0)
    with pytest.raises(flipout.BatchError, match=r"shape \(4,\), which has no dimension batch_dim=1"):
        flipout.Perturbed(Net(), flipout.Gaussian(0.1), batch_dim=1)(torch.ones(4))


def test_rows_that_are_mixed_are_named() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.ones(5, 5).triu() @ x)

    net = flipout.Perturbed(Mixes(), flipout.Gaussian(0.1))
    with pytest.raises(
        flipout.BatchError, match=r"shape \(5, 4\) which was made of one of shape \(5, 4\) by an operation along its"
    ):
        net(torch.ones(5, 4))
    assert type(net.module.layer.weight) is nn.Parameter


def test_a_stack_indexed_by_expert_is_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x.view(3, 2, 4), self.w).view(6, 2)

    net = flipout.Perturbed(Experts(), flipout.Gaussian(0.1))
    with pytest.raises(flipout.BatchError, match="mixture of experts"):
        net(torch.ones(6, 4))


@pytest.mark.parametrize(("rows", "length"), [(5, 7), (4, 8), (9, 9), (3, 12)])
def test_positions_without_a_batch_dimension_are_not_taken_for_rows(rows: int, length: int) -> None:
    """``wpe(arange(T))`` is one lookup for all examples, whether or not T fits the rows by chance."""

    class Positions(nn.Module):
        def __init__(self, lead: bool) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 3)
            self.lead = lead

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            positions = torch.arange(2, 2 + x.shape[1])
            return x + self.table(positions[None] if self.lead else positions)

    x = torch.randn(rows, length, 3)
    for lead in (True, False):
        net = flipout.Perturbed(Positions(lead), flipout.Gaussian(0.1))
        with net.hold(rows) as draw, torch.no_grad():
            expected = torch.cat([draw.module(n)(x[n : n + 1]) for n in range(rows)])
            assert torch.allclose(net(x), expected, atol=1e-6)


def test_a_label_a_row_is_its_rows() -> None:
    labels = torch.randint(5, (9,))
    net = flipout.Perturbed(nn.Embedding(5, 3), flipout.Gaussian(0.1))
    with net.hold(9) as draw, torch.no_grad():
        expected = torch.stack([draw.weights(n)["weight"][labels[n]] for n in range(9)])
        assert torch.allclose(net(labels), expected, atol=1e-6)
