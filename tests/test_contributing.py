"""What CONTRIBUTING.md adds by way of example works."""

from __future__ import annotations

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import EXACT, Z_LIMIT, distance, oracle, worst, z_mean

import flipout
from flipout import registry

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
ADDED: dict[str, str] = {}
for _block in re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
    for _path, _change in re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", _block, re.MULTILINE | re.DOTALL):
        ADDED[_path] = "".join(f"{line[1:]}\n" for line in _change.splitlines() if line.startswith("+"))


def added_to(path: str) -> dict[str, Any]:
    """The names of a module of the library after what the page adds to it."""
    name = ".".join(Path(path).with_suffix("").parts[1:])
    there = (PAGE.parent / path).exists()
    namespace = dict(vars(importlib.import_module(name))) if there else {"__name__": name}
    exec(compile("from __future__ import annotations\n" + ADDED[path], path, "exec"), namespace)
    return namespace


def test_the_noise_has_mean_zero_variance_one_and_its_density():
    noise = added_to("src/flipout/noise.py")["Logistic"](0.3)
    unit = noise.unit(
        torch.Size([20_000]), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device=torch.device("cpu")
    )
    size = 2 * math.log(2) * math.sqrt(3) / math.pi
    assert worst(torch.stack([z_mean(unit, 0.0), z_mean(unit.square(), 1.0), z_mean(unit.abs(), size)])) < Z_LIMIT
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    assert torch.trapezoid(noise.unit_log_prob(grid).exp(), grid).item() == pytest.approx(1.0)


def test_the_estimator_turns_the_sign_of_half_the_members():
    module = torch.nn.Linear(4, 3).double()
    net = flipout.Perturbed(module, flipout.Gaussian(0.3), added_to("src/flipout/estimators.py")["Antithetic"]())
    x = torch.randn(6, 4, dtype=torch.float64)
    with net.hold(6) as draw:
        assert distance(net(x), oracle(net, draw, [x])) <= EXACT
        assert distance(draw.weights(1)["weight"] + draw.weights(4)["weight"], 2 * module.weight) <= EXACT
    with pytest.raises(flipout.ArgumentError, match="an even number"):
        net(x[:5])


def test_the_prior_has_a_density():
    prior = added_to("src/flipout/bayes/priors.py")["PowerExponential"](0.5, 1.5)
    grid = torch.linspace(-20, 20, 80_001, dtype=torch.float64)
    assert torch.trapezoid(prior.log_prob(grid).exp(), grid).item() == pytest.approx(1.0, abs=1e-6)
    net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.1, learnable=True))
    assert flipout.bayes.kl_divergence(net, prior, samples=2).isfinite()


def test_the_data_set_says_where_it_came_from():
    data = added_to("src/flipout/data/small_digits.py")["small_digits"]()
    assert data.train.inputs.shape == (1500, 1, 8, 8)
    assert len(data.test.labels) == 297
    assert data.source.startswith("scikit-learn")


def test_the_rule_agrees_with_the_oracle(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    added_to("src/flipout/rules/linear.py")
    importlib.import_module("cases.linear")
    case = eval(ADDED["tests/cases/linear.py"].strip().rstrip(","), vars(importlib.import_module("cases.linear")))
    for estimator in (flipout.Flipout(), flipout.Independent()):
        net = flipout.Perturbed(case.build(), flipout.Gaussian(0.3), estimator)
        for rows in (3, 6):
            x = case.draw_inputs(rows)
            with net.hold(3) as draw:
                assert distance(net(*x), oracle(net, draw, x)) <= EXACT


def test_every_example_is_tried():
    assert {path for path in ADDED if path.startswith("src/")} == {
        f"src/flipout/{name}.py" for name in ("noise", "estimators", "bayes/priors", "data/small_digits", "rules/linear")
    }
