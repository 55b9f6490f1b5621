"""Weight decay and learnable noise: groups of parameters for an optimiser, and a warning where a scale decays.

``log_std`` is the logarithm of a standard deviation. Weight decay pulls it towards 0, that is towards a standard deviation of 1, so
a net with σ = 0.01 becomes noisier at every step. Another parametrisation (the distance of log σ from its start, say) would not
help: decay would then pull σ back to its start, against the loss, and saved scales would change their meaning. So the scales are
kept out of the decay.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from flipout.errors import ArgumentError, DecayWarning

__all__ = ["parameter_groups", "watch"]

#: The living modules that own learnable scales, in ``log_std``. Kept instead of the parameters, which ``.to()`` and FSDP replace.
_owners: WeakSet[nn.Module] = WeakSet()
_lock = threading.Lock()
#: The groups of each optimiser when it was last checked: the number of parameters and the decay of each.
_checked: WeakKeyDictionary[Optimizer, list[tuple[int, Any]]] = WeakKeyDictionary()
#: The optimisers that were warned about.
_warned: WeakSet[Optimizer] = WeakSet()
#: The handle of the hook on all optimisers, once there is one.
_handles: list[Any] = []


def parameter_groups(module: nn.Module, weight_decay: float, noise_lr: float | None = None, **options: Any) -> list[dict[str, Any]]:
    """The parameters of a module in groups for an optimiser of ``torch.optim``, with the noise scales kept out of the weight decay.

    For any module that holds a :class:`flipout.Perturbed` somewhere, such as a Lightning module. Frozen parameters are in the
    groups, as they are in ``module.parameters()``: optimisers leave them alone, and train them once they are unfrozen.

    Args:
        module: a Perturbed, or a module that contains some.
        weight_decay: of all parameters but the scales, which have 0.
        noise_lr: learning rate of the scales; None for the optimiser's own.
        options: more options of both groups, such as ``lr``.

    Returns:
        A group of the module's own parameters and a group of the scales. A group without parameters is left out.

    Raises:
        ArgumentError: if ``weight_decay`` or ``noise_lr`` is negative or not finite, or an option is called ``params``.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(4, 3), flipout.Gaussian(0.01, learnable=True))
        >>> model = torch.nn.Sequential(net, torch.nn.ReLU())
        >>> optimiser = torch.optim.AdamW(flipout.parameter_groups(model, weight_decay=0.1, noise_lr=1e-2), lr=1e-3)
        >>> [(len(group["params"]), group["weight_decay"], group["lr"]) for group in optimiser.param_groups]
        [(2, 0.1, 0.001), (2, 0.0, 0.01)]
    """
    for name, value in {"weight_decay": weight_decay, "noise_lr": 0.0 if noise_lr is None else noise_lr}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise ArgumentError(f"parameter_groups({name}={value!r}): expected a finite number, 0 or more")
    if "params" in options:
        raise ArgumentError(
            "parameter_groups(params=...): the parameters are the module's own; pass the others in a group beside these"
        )
    scales = list({id(scale): scale for owner in _in(module) for scale in owner.log_std.parameters()}.values())
    known = {id(scale) for scale in scales}
    means = [parameter for parameter in module.parameters() if id(parameter) not in known]
    noise_options = options if noise_lr is None else {**options, "lr": noise_lr}
    groups = [
        {**options, "params": means, "weight_decay": weight_decay},
        {**noise_options, "params": scales, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def watch(owner: nn.Module) -> None:
    """Warns from now on when an optimiser steps while it decays the scales in ``owner.log_std``.

    For each module when it is made, copied and unpickled. The hook is one for all optimisers of the process, and is made with the
    first learnable scale.
    """
    if not len(owner.log_std):  # type: ignore[arg-type]
        return
    with _lock:
        _owners.add(owner)
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
    """Checks the groups of an optimiser if they are not those of the last check."""
    if torch.compiler.is_compiling() or not len(_owners):
        return
    groups = [(len(group["params"]), group.get("weight_decay", 0)) for group in optimiser.param_groups]
    if _checked.get(optimiser) == groups:
        return
    decaying, frozen = _decaying(optimiser)
    if not frozen:  # else look again at the next step: they may be unfrozen by then
        _checked[optimiser] = groups
    if decaying and optimiser not in _warned:
        _warned.add(optimiser)
        warnings.warn(_told(optimiser, decaying), DecayWarning, stacklevel=3)


def _decaying(optimiser: Optimizer) -> tuple[list[tuple[str, float]], bool]:
    """Names and decay of the scales that the optimiser decays, and whether there are frozen ones beside them."""
    with _lock:
        owners: list[Any] = list(_owners)
    names = {id(scale): name for owner in owners for name, scale in owner.log_std.named_parameters()}
    found, frozen = [], False
    for group in optimiser.param_groups:
        if group.get("weight_decay", 0):
            for parameter in group["params"]:
                if id(parameter) in names:
                    frozen = frozen or not parameter.requires_grad
                    if parameter.requires_grad:
                        found.append((names[id(parameter)].replace("/", "."), float(group["weight_decay"])))
    return found, frozen


def _told(optimiser: Optimizer, decaying: list[tuple[str, float]]) -> str:
    name, decay = decaying[0]
    more = f" and {len(decaying) - 1} more" if len(decaying) > 1 else ""
    kind = type(optimiser).__name__
    return (
        f"{kind} applies weight_decay={decay:g} to log_std of {name!r}{more}: decay pulls log_std towards 0, which is a standard "
        f"deviation of 1, so the noise grows at every step. Pass {kind}(net.parameter_groups(weight_decay={decay:g}), ...), or "
        "flipout.parameter_groups(model, ...) for a model that contains the net. In a Hugging Face Trainer, override "
        "get_decay_parameter_names() and leave out the names that contain 'log_std.'"
    )


def _in(module: nn.Module) -> Iterator[Any]:
    """The owners of learnable scales within a module."""
    return (part for part in module.modules() if part in _owners)
