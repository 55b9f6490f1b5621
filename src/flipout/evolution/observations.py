"""Observation normalisation that a whole population shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flipout.errors import ArgumentError

__all__ = ["ObservationNormalizer"]


class ObservationNormalizer:
    """Observations less their running mean, over their running standard deviation, the same for every member of a generation.

    What a generation sees is collected with :meth:`observe` and counts from the next one on (:meth:`update`), so that all members
    of a generation are compared under one normalisation, in whatever chunks they run.

    Args:
        shape: of one observation.
        clip: the largest magnitude returned.

    Example:
        >>> normalizer = ObservationNormalizer((2,))
        >>> normalizer.observe(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
        >>> normalizer.update()
        >>> normalizer(torch.tensor([[3.0, 20.0]]))
        tensor([[1., 0.]])
    """

    def __init__(self, shape: Sequence[int], clip: float = 10.0) -> None:
        if not isinstance(clip, int | float) or not clip > 0:
            raise ArgumentError(f"clip={clip!r}: expected a positive bound")
        self.clip = float(clip)
        self._new = _zeros(shape)
        self._rest_on(_zeros(shape))

    def _rest_on(self, total: Tensor) -> None:
        """Sets what the normalisation rests on, and works out the mean and the deviation once for the whole generation."""
        self._total = total
        self._mean = total[1] / max(self.count, 1)
        self._std = (total[2] / max(self.count, 1) - self._mean.square()).clamp_min(1e-8).sqrt()

    @property
    def count(self) -> int:
        """How many observations the normalisation rests on."""
        return int(self._total[0].flatten()[0])

    def __call__(self, observations: Tensor) -> Tensor:
        """Normalised observations ``[n, *shape]``, as they came while there are fewer than two to go by."""
        if self.count < 2:
            return observations
        scaled: Tensor = (observations - self._mean.to(observations)) / self._std.to(observations)
        return scaled.clamp(-self.clip, self.clip)

    def observe(self, observations: Tensor) -> None:
        """Collects observations ``[n, *shape]`` for the next generation.

        Raises:
            ArgumentError: for observations of another shape, or such that are not finite: one would spoil all that follow.
        """
        seen = observations.detach().to("cpu", torch.float64)
        if seen.shape[1:] != self._total.shape[1:] or not seen.dim():
            wanted = ", ".join(map(str, ("n", *self._total.shape[1:])))
            raise ArgumentError(f"observations of shape {tuple(seen.shape)}: expected [{wanted}]")
        if not bool(seen.isfinite().all()):
            raise ArgumentError("an observation is not finite, and would spoil the running mean for good; look to the environment")
        self._new[0] += len(seen)
        self._new[1] += seen.sum(0)
        self._new[2] += seen.square().sum(0)

    def collect(self) -> Tensor:
        """Takes what was observed since the last update out, ``[3, *shape]``: counts, sums, sums of squares."""
        found, self._new = self._new, torch.zeros_like(self._new)
        return found

    def merge(self, collected: Tensor) -> None:
        """Adds what another process has collected.

        Raises:
            ArgumentError: if it is of observations of another shape.
        """
        if collected.shape != self._new.shape:
            was, now = tuple(collected.shape[1:]), tuple(self._new.shape[1:])
            raise ArgumentError(f"what was collected is of observations of shape {was}; expected {now}, those of one environment")
        self._new = self._new + collected

    def update(self) -> None:
        """Makes what was observed part of the normalisation."""
        self._rest_on(self._total + self.collect())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"total": self._total.clone(), "new": self._new.clone(), "clip": self.clip}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            ArgumentError: if it is of observations of another shape.
        """
        if state["total"].shape != self._total.shape:
            was, now = tuple(state["total"].shape[1:]), tuple(self._total.shape[1:])
            raise ArgumentError(f"the saved normalisation is of observations of shape {was}, not {now}")
        self._rest_on(state["total"].clone())
        self._new, self.clip = state["new"].clone(), float(state["clip"])


def _zeros(shape: Sequence[int]) -> Tensor:
    return torch.zeros(3, *shape, dtype=torch.float64)
