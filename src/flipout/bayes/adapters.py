"""Posteriors over the adapters of a large model (LoRA, by ``peft``), whose own weights stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from flipout.bayes.posterior import posteriors, require_net
from flipout.errors import ArgumentError
from flipout.noise import Gaussian, Noise
from flipout.perturb import Perturbed

__all__ = ["fixed_noise", "random_adapters"]

#: What peft calls the parameters of its low-rank adapters.
_LORA = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


def random_adapters(model: nn.Module, std: float = 0.01, **options: Any) -> Perturbed:
    """Makes the adapters of a ``peft`` model random: a posterior over few weights of a large model.

        y_n = W x_n + s (B + ΔB_n) (A + ΔA_n) x_n,      ΔA_n, ΔB_n Gaussian with scales that are learnt

    The model's own weights are frozen and meet no noise, so a draw costs what the adapters cost. Every
    sequence of a batch is one function, over all its tokens. All parameters that peft trains become random,
    those of a head in ``modules_to_save`` as well. Train with :class:`flipout.bayes.IVON` (Cong et al. 2024)
    or by Backprop with :func:`flipout.bayes.elbo_loss`; ``net.module.merge_and_unload()`` merges the mean.

    Args:
        model: what ``peft.get_peft_model`` returned, or any module whose adapters are named as peft's are.
        std: starting standard deviation, in the units of the weights.
        options: other arguments of :class:`flipout.Perturbed`: ``estimator``, ``generator``, ``unmet``.

    Raises:
        ArgumentError: if the model has no adapters, or none that is trained; for a wrong ``std``.

    Example:
        >>> class Adapted(nn.Linear):
        ...     def __init__(self):
        ...         super().__init__(4, 3)
        ...         self.requires_grad_(False)
        ...         self.lora_A, self.lora_B = nn.Linear(4, 1, bias=False), nn.Linear(1, 3, bias=False)
        ...     def forward(self, x):
        ...         return super().forward(x) + self.lora_B(self.lora_A(x))
        >>> sorted(random_adapters(Adapted()).noises)
        ['lora_A.weight', 'lora_B.weight']
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"random_adapters takes a model, not a {type(model).__name__}")
    if "include" in options or "exclude" in options:
        raise ArgumentError(
            "random_adapters chooses the parameters that are trained; freeze those that should have no noise, or use "
            "flipout.Perturbed with include="
        )
    named = dict(model.named_parameters())
    adapters = [name for name in named if any(part in _LORA for part in name.split("."))]
    if not adapters:
        raise ArgumentError(
            f"{type(model).__name__} has no adapters (parameters of {', '.join(_LORA[:2])}): make them with peft.get_peft_model "
            "first; were they merged?"
        )
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    if not any(name in trained for name in adapters):
        raise ArgumentError(
            f"none of the {len(adapters)} parameters of the adapters, such as {adapters[0]!r}, is trained: set "
            "inference_mode=False in their configuration, or requires_grad"
        )
    return Perturbed(model, Gaussian(std, learnable=True), include=trained, **options)


def fixed_noise(net: Perturbed) -> dict[str, Noise]:
    """The noise of a net with its learnt scales as fixed ones, by parameter name.

    For :func:`flipout.perturbed`, under which methods of the module such as ``generate`` are random too, and
    for wrapping a copy. Scales are copied and do not follow the net. Relative noise and noise that is not
    learnt is as it was.

    Raises:
        ArgumentError: if ``net`` is no :class:`flipout.Perturbed`, or learns another noise than Gaussian.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(nn.Linear(3, 2), flipout.Gaussian(0.1, learnable=True))
        >>> with flipout.perturbed(net.module, fixed_noise(net)):
        ...     y = net.module(torch.ones(4, 3))
        >>> bool(y.std(0).min() > 0)
        True
    """
    found: dict[str, Noise] = {}
    for each in posteriors(require_net(net)):
        if each.log_std is None:
            found[each.name] = each.noise
            continue
        if not isinstance(each.noise, Gaussian):
            raise ArgumentError(f"{each.name!r} learns the scale of {each.noise}; fixed_noise knows Gaussian noise alone")
        found[each.name] = Gaussian(each.log_std.detach().exp(), relative=each.noise.relative)
    return found
