"""What an optimiser of a posterior moves: the mean and the scale of each random weight; and its options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flipout.errors import ArgumentError
from flipout.noise import Gaussian
from flipout.perturb import Perturbed

__all__ = ["check_options", "is_number", "mean_scale_pairs", "require_all_random", "require_number"]


def mean_scale_pairs(net: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Mean and scale of each random parameter by its name."""
    if not isinstance(net, nn.Module):
        raise ArgumentError(
            f"IVON takes a net, not a {type(net).__name__}: the flipout.Perturbed whose means and scales it trains, in which each "
            "of them is once"
        )
    parts = [(path, part) for path, part in net.named_modules() if isinstance(part, Perturbed)]
    if not parts:
        raise ArgumentError(
            f"{type(net).__name__} has no random weights: wrap it, for example with flipout.Perturbed(module, "
            "flipout.Gaussian(0.05, learnable=True))"
        )
    pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    seen: dict[int, str] = {}
    for path, part in parts:
        for site in part.sites:
            name = f"{path}.{site.name}" if path else site.name
            noise = site.noise
            if not isinstance(noise, Gaussian) or noise.relative or not noise.learnable:
                raise ArgumentError(
                    f"{name!r} has the noise {noise}; IVON learns N(mean, σ²) with a scale of its own for each weight, so it takes "
                    "Gaussian(std, learnable=True) that is not relative; or exclude the parameter"
                )
            mean, scale = site.mean, part.scales[site.name]
            if id(mean) in seen or id(scale) in seen:
                other = seen.get(id(mean), seen.get(id(scale)))
                raise ArgumentError(
                    f"{name!r} and {other!r} are one parameter with two noises: IVON would move it, or its scale, twice; "
                    "perturb it in one wrapper"
                )
            seen[id(mean)] = seen[id(scale)] = name
            pairs[name] = (mean, scale)  # type: ignore[assignment]
    return pairs


def require_all_random(net: nn.Module, pairs: Mapping[str, tuple[Tensor, Tensor]], rest: str) -> None:
    """Raises where a parameter is trained and not random, so that this optimiser would leave it as it is."""
    known = {id(tensor) for pair in pairs.values() for tensor in pair}
    left = [name for name, p in net.named_parameters() if p.requires_grad and id(p) not in known]
    if left and rest == "raise":
        raise ArgumentError(
            f"{', '.join(map(repr, left[:3]))}{f' and {len(left) - 3} more' if len(left) > 3 else ''} require gradients and are "
            "not random, so IVON would leave them as they are: include them in the noise, freeze them, or pass "
            'rest="ignore" and give them to another optimiser'
        )


def is_number(value: Any) -> bool:
    """Whether a value is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ArgumentError for options out of range."""
    lr, size, decay = options["lr"], options["effective_sample_size"], options["weight_decay"]
    require_number("lr", lr, is_number(lr) and math.isfinite(lr) and lr >= 0, "a finite step size, 0 or more")
    require_number(
        "effective_sample_size",
        size,
        is_number(size) and math.isfinite(size) and size >= 1,
        "the number of training examples, 1 or more",
    )
    require_number(
        "weight_decay",
        decay,
        is_number(decay) and math.isfinite(decay) and decay > 0,
        "a positive number: it is the prior, N(0, 1 / (effective_sample_size · weight_decay)), and a precision of zero is no prior",
    )
    for name in ("temperature", "clip"):
        value = options[name]
        good = is_number(value) and value > 0 and (name == "clip" or math.isfinite(value))
        require_number(name, value, good, "a positive number")
    betas = options["betas"]
    good = isinstance(betas, tuple | list) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
    require_number("betas", betas, good, "two numbers from 0 to less than 1")


def require_number(name: str, value: Any, good: bool, wanted: str) -> None:
    """Raises ArgumentError unless the value is good."""
    if not good:
        raise ArgumentError(f"IVON({name}={value!r}): expected {wanted}")
