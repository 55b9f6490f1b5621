"""Exploration by noisy weights: one set an episode (Plappert et al. 2018), or learnable at every step (Fortunato et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flipout.errors import ArgumentError
from flipout.estimators import Estimator, Flipout
from flipout.noise import Gaussian, Noise
from flipout.perturb import Perturbed

__all__ = ["ParameterNoise", "noisy"]


class ParameterNoise:
    """Noise on a policy's weights that stays for an episode, with its own weights for every sub-environment.

    Plappert et al. 2018, *Parameter space noise for exploration*: actions follow one perturbed policy from the start of an
    episode to its end, so that exploration is consistent in the state. Here the rows of a batch are the sub-environments of a
    vector environment, and all have different weights for one batched pass. The policy itself is never touched.

    Args:
        policy: any module; its first tensor argument has a row for each sub-environment.
        std: σ at the start.
        envs: how many sub-environments.
        target: the distance between the actions of the noisy and of the clean policy that :meth:`adapt` aims at; None leaves σ as
            it is.
        factor: by which :meth:`adapt` changes σ.
        estimator: how sub-environments share a draw.
        seed: of the noise.
        include, exclude: patterns of the parameters to perturb, as in :class:`flipout.Perturbed`.

    Raises:
        ArgumentError: for a std, target or factor that is not positive.

    Example:
        >>> import torch, flipout
        >>> policy = torch.nn.Linear(4, 2)
        >>> explore = flipout.evolution.ParameterNoise(policy, std=0.1, envs=3)
        >>> x = torch.ones(3, 4)
        >>> first = explore(x)
        >>> bool((explore(x) == first).all())  # the same weights for the whole episode
        True
        >>> explore.end([False, True, False])  # the episode of environment 1 is over
        >>> (explore(x) == first).all(1)
        tensor([ True, False,  True])
    """

    def __init__(
        self,
        policy: nn.Module,
        std: float = 0.05,
        envs: int = 1,
        *,
        target: float | None = None,
        factor: float = 1.01,
        estimator: Estimator = Flipout(),  # noqa: B008  (frozen)
        seed: int = 0,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
    ) -> None:
        if target is not None and not target > 0:
            raise ArgumentError(f"target={target!r}: expected a positive distance, or None for a fixed std")
        if not factor > 1:
            raise ArgumentError(f"factor={factor!r}: expected a number above 1")
        self.envs, self.target, self.factor, self.std = envs, target, factor, float(std)
        self._policy = policy
        generator = torch.Generator(next(policy.parameters()).device).manual_seed(seed)
        # a draw keeps unit noise apart from a learnable scale, so that adapt() moves the scale and leaves the directions
        noise = Gaussian(self.std, learnable=True)
        self._net = Perturbed(policy, noise, estimator, include, exclude, generator=generator)
        for scale in self._net.noise_parameters():
            scale.requires_grad_(False)
        self._draw = self._net.draw(envs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the policy returns under each sub-environment's weights."""
        with torch.no_grad(), self._net.under(self._draw):
            return self._net(*args, **kwargs)

    def end(self, done: Sequence[bool] | Tensor) -> None:
        """Draws new weights for the sub-environments whose episodes ended.

        Args:
            done: ``[envs]``.

        Raises:
            ArgumentError: if it has another length.
        """
        flags = torch.as_tensor(done, dtype=torch.bool).flatten().tolist()
        if len(flags) != self.envs:
            raise ArgumentError(f"done has {len(flags)} entries for {self.envs} sub-environments")
        self._draw.resample([i for i, over in enumerate(flags) if over])

    def adapt(self, *args: Any, distance: Callable[[Tensor, Tensor], Tensor] | None = None, **kwargs: Any) -> float:
        """Brings σ a step nearer to the target distance, from a batch of ``k * envs`` rows.

        May be called at any time of an episode: a sub-environment's noise gets larger or smaller, and keeps its direction.

        Args:
            args, kwargs: for the policy.
            distance: of the noisy from the clean output; by default the root of the mean squared difference. For a DQN, Plappert et
                al. take the KL divergence between the softmaxes of the values.

        Returns:
            The distance found.
        """
        noisy_output = self(*args, **kwargs)
        with torch.no_grad():
            clean = self._policy(*args, **kwargs)
            found = float((distance or _root_mean_square)(noisy_output, clean))
        if self.target is not None:
            self.std *= self.factor if found < self.target else 1 / self.factor
            with torch.no_grad():
                for scale in self._net.noise_parameters():
                    scale.fill_(math.log(self.std))
        return found


def _root_mean_square(noisy_output: Tensor, clean: Tensor) -> Tensor:
    return (noisy_output - clean).square().mean().sqrt()


def noisy(module: nn.Module, std: float = 0.5, estimator: Estimator = Flipout(), **options: Any) -> Perturbed:  # noqa: B008
    """A net with learnable noise on its linear layers and convolutions, as NoisyNet has, but with its own weights for every row.

    Fortunato et al. 2018, *Noisy networks for exploration*: W = W̄ + Σ ∘ ε with Σ learned by the same loss, starting at ``std /
    √fan_in`` for weights and biases. NoisyNet shares one ε among the rows of a batch; here every row of a replay batch, and every
    sub-environment, has its own (in training mode; in evaluation mode the net is its means).

    Args:
        module: any module that has such layers.
        std: σ₀ of the paper.
        estimator, options: as in :class:`flipout.Perturbed`.

    Raises:
        ArgumentError: if it has no linear layer or convolution, or std is not positive.

    Example:
        >>> import torch, flipout
        >>> net = flipout.evolution.noisy(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        >>> net(torch.ones(5, 4)).std(0).min() > 0, len(list(net.noise_parameters()))
        (tensor(True), 4)
    """
    laws: dict[str, Noise] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            scale = std / math.sqrt(layer.weight[0].numel())
            for name, _ in layer.named_parameters(prefix=path, recurse=False):
                laws[name] = Gaussian(scale, learnable=True)
    if not laws:
        raise ArgumentError(f"{type(module).__name__} has no linear layer or convolution to make noisy")
    return Perturbed(module, laws, estimator, **options)
