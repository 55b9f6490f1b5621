"""Models from outside: wrapped in one line, judged by the loop over members, trained, generated from, saved and loaded."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import EXACT, distance
from torch import Tensor, nn
from zoo import MIXTRAL, ZOO, Entry

import flipout

transformers = pytest.importorskip("transformers", reason="models from outside need the transformers package")
transformers.logging.set_verbosity_error()

N = 3
NOISE = flipout.Gaussian(0.1)
BY_NAME = {entry.name: entry for entry in ZOO}
GENERATES = [entry.name for entry in ZOO if entry.generates]


@functools.cache
def _built(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return BY_NAME[name].make()


def made(name: str) -> tuple[Entry, nn.Module]:
    """A fresh copy of a model of the zoo."""
    return BY_NAME[name], copy.deepcopy(_built(name))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {key: value[n : n + 1] for key, value in inputs.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_parameter_is_perturbed_as_in_the_loop_over_members(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, module = made(name)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # some compute in float32 inside: judge the rules, not that
    net = flipout.Perturbed(module, NOISE, exclude=entry.exclude, generator=seeded())
    excluded = {id(p) for n, p in module.named_parameters() if n not in net.noises}
    assert len(net.noises) == len(list(module.parameters())) - len(excluded)
    assert bool(excluded) is bool(entry.exclude)
    inputs = entry.inputs(N)
    with net.hold(members=N) as draw:
        y = net(**inputs).logits
        single = [
            torch.func.functional_call(module, draw.weights(n), kwargs=row(inputs, n), tie_weights=True).logits for n in range(N)
        ]
    assert distance(y, torch.cat(single)) < EXACT
    assert distance(y, module(**inputs).logits) > 1e-3


@pytest.mark.parametrize("name", BY_NAME)
def test_mean_mode_is_the_untouched_model_and_training_moves_every_parameter(name: str) -> None:
    entry, module = made(name)
    inputs = entry.inputs(N)
    expected = module(**inputs).logits
    net = flipout.Perturbed(module, flipout.Gaussian(0.1, learnable=True), exclude=entry.exclude, generator=seeded())
    assert torch.equal(net.eval()(**inputs).logits, expected)
    net.train()
    before = {key: value.clone() for key, value in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(**inputs).logits.square().mean().backward()
    optimizer.step()
    still = {key.replace("/", ".") for key, value in net.named_parameters() if torch.equal(value, before[key])}
    # what cannot move: biases of keys, a constant to the softmax; frozen positions
    assert all(any(part in key for part in ("key.bias", "k_proj.bias", "embed_positions")) for key in still), still
    assert all(value.isfinite().all() for value in net.parameters())


@pytest.mark.parametrize("name", GENERATES)
def test_every_row_of_generate_is_one_model(name: str) -> None:
    entry, module = made(name)
    inputs = (entry.generate_inputs or entry.inputs)(N)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = module.generate(**inputs, **options)
    before = dict(module.named_parameters())
    noise = flipout.Gaussian(0.5)
    with flipout.perturbed(module, noise, exclude=entry.exclude, generator=seeded(), members=N) as draw:
        drawn = module.generate(**inputs, **options)
    assert all(parameter is before[key] for key, parameter in module.named_parameters())
    assert not torch.equal(drawn, plain)
    for n in range(N):
        alone = draw.module(n).generate(**row(inputs, n), **options)
        assert torch.equal(drawn[n : n + 1, : alone.shape[1]], alone)
    assert torch.equal(module.generate(**inputs, **options), plain)


def test_the_first_call_counts_the_members() -> None:
    """An encoder that generate() calls by itself is a call like any other."""
    entry, module = made("T5")
    inputs = entry.generate_inputs(N) if entry.generate_inputs else {}
    with flipout.perturbed(module, NOISE, exclude=entry.exclude, generator=seeded()) as draw:
        first = module.generate(**inputs, max_new_tokens=3)
        again = module.generate(**inputs, max_new_tokens=3)
    assert draw.members == N
    assert torch.equal(first, again)


def test_beams_are_rows_of_their_member() -> None:
    entry, module = made("GPT-2")
    inputs = entry.inputs(N)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    with flipout.perturbed(module, flipout.Gaussian(0.5), generator=seeded(), members=N) as draw:
        drawn = module.generate(**inputs, **options)
    alone = [draw.module(n).generate(**row(inputs, n), **options) for n in range(N)]
    assert torch.equal(drawn, torch.cat(alone))


def test_cached_decoding_is_the_whole_pass() -> None:
    """Step by step with a key/value cache under one held draw, each row is the model that saw the sequence at once."""
    entry, module = made("Llama")
    net = flipout.Perturbed(module, NOISE, generator=seeded())
    tokens = entry.inputs(N)["input_ids"]
    with torch.no_grad(), net.hold(members=N):
        whole = net(input_ids=tokens).logits
        cache, steps = None, []
        for t in range(tokens.shape[1]):
            out = net(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert distance(torch.cat(steps, 1), whole) < EXACT


@pytest.mark.parametrize("name", BY_NAME)
def test_the_checkpoint_is_the_models_own(name: str, tmp_path: Path) -> None:
    entry, module = made(name)
    net = flipout.Perturbed(module, NOISE, exclude=entry.exclude)
    inputs = entry.inputs(N)
    net.train()(**inputs)
    net.module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path, dtype=torch.float64).eval()
    own = module.state_dict()
    assert own.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
    assert distance(loaded(**inputs).logits, net.eval()(**inputs).logits) < 1e-8  # as close as two aligned copies compute
    assert all("log_std" not in key and "module." not in key for key in loaded.state_dict())


# --- a mixture of experts ----------------------------------------------------------------------------------------------------


def _mixtral(experts: str) -> nn.Module:
    module = MIXTRAL.make().float()
    if not hasattr(module, "set_experts_implementation"):  # one module an expert: the router calls plain linear layers
        pytest.skip("this transformers has no choice of experts implementation")
    module.set_experts_implementation(experts)
    return module


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_a_mixture_of_experts_raises_by_name(experts: str) -> None:
    net = flipout.Perturbed(_mixtral(experts), NOISE)
    with pytest.raises(flipout.BatchError, match=r"experts\.gate_up_proj.*granularity=\"token\".*exclude="):
        net(**MIXTRAL.inputs(N))


@pytest.mark.parametrize("experts", ["grouped_mm", "eager", "batched_mm"])
def test_a_mixture_of_experts_works_per_token(experts: str) -> None:
    module = _mixtral(experts)
    net = flipout.Perturbed(module, NOISE, flipout.Flipout(granularity="token"), generator=seeded())
    assert len(net.noises) == len(list(module.parameters()))
    inputs = MIXTRAL.inputs(N)
    first, second = net(**inputs).logits, net(**inputs).logits
    assert first.isfinite().all()
    assert not torch.equal(first, second)
    net(**inputs).logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
    tiny = flipout.Perturbed(module, flipout.Gaussian(1e-9), flipout.Flipout(granularity="token"))
    assert distance(tiny(**inputs).logits, module(**inputs).logits) < 1e-5


def test_unstacked_experts_leave_the_rest_exact() -> None:
    module = _mixtral("eager")
    net = flipout.Perturbed(module, NOISE, exclude="*.experts.*", generator=seeded())
    inputs = MIXTRAL.inputs(N)
    with net.hold(members=N) as draw:
        y = net(**inputs).logits
        single = [torch.func.functional_call(module, draw.weights(n), kwargs=row(inputs, n)).logits for n in range(N)]
    assert distance(y, torch.cat(single)) < 1e-5  # the grouped product is float32
