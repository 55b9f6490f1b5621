"""Fitness as an evaluation returns it: checked, made finite, shaped."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flipout.errors import ArgumentError
from flipout.evolution.shaping import Shaping

__all__ = ["with_finite_fitness", "require_fitness", "require_kept", "shaped"]


def require_fitness(fitness: object, count: int, what: str) -> Tensor:
    """Fitness as float64 ``[count]``, on the device where it is.

    Raises:
        ArgumentError: if it holds no numbers, or not ``count`` of them.
    """
    try:
        # Python's numbers have 53 bits, and torch would keep 24 of them
        exact = torch.float64 if isinstance(fitness, list | tuple) else None
        found = torch.as_tensor(fitness, dtype=exact).detach()
        if found.is_complex():
            raise TypeError("complex numbers have no order")
        found = found.to(torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{what} is a {type(fitness).__name__}, not a number for each of {count} members ({error})") from error
    if found.shape != (count,):
        raise ArgumentError(f"{what} has shape {tuple(found.shape)}; expected one number for each of {count} members, [{count}]")
    return found


def require_kept(kept: Tensor | None, population: int, each: int) -> Tensor:
    """Which members count, bool ``[population]``: all, or whole pairs of them where ``each`` is 2.

    Raises:
        ArgumentError: for a mask of another kind, an empty one, or half a pair.
    """
    if kept is None:
        return torch.ones(population, dtype=torch.bool)
    kept = torch.as_tensor(kept).cpu()
    if kept.dtype != torch.bool or kept.shape != (population,):
        raise ArgumentError(f"kept is {kept.dtype} {tuple(kept.shape)}; expected torch.bool [{population}]")
    if not bool(kept.any()):
        raise ArgumentError("no member is kept: the generation has no fitness, and no update can be formed")
    if bool((kept.view(-1, each).sum(1) % each).any()):
        raise ArgumentError("kept has one member of an antithetic pair without the other; drop whole pairs")
    return kept


def with_finite_fitness(fitness: Tensor, members: Tensor, on_nan: str) -> Tensor:
    """The fitness, where ``on_nan`` is ``"worst"`` with what is not finite replaced by the least that is.

    Args:
        fitness: ``[n]``.
        members: whose it is, ``[n]``, for the message.
        on_nan: ``"error"`` or ``"worst"``.

    Raises:
        ArgumentError: under ``"error"`` if some fitness is not finite, and always if none is.
    """
    bad = ~fitness.isfinite()
    if not bool(bad.any()):
        return fitness
    where = members[bad]
    some = ", ".join(str(int(n)) for n in where[:5]) + (", ..." if len(where) > 5 else "")
    if on_nan == "error" or bool(bad.all()):
        way = "no member has finite fitness" if bool(bad.all()) else 'on_nan="worst" makes it the worst of the generation'
        raise ArgumentError(f"the fitness of {len(where)} members is not finite (members {some}); {way}")
    return torch.where(bad, fitness[~bad].min(), fitness)


def shaped(shaping: Shaping, fitness: Tensor, generation: int) -> Tensor:
    """The weights of the update, float64 ``[n]``; zeros and a warning where all fitness is the same.

    Raises:
        ArgumentError: if the shaping returns anything but n finite numbers.
    """
    if bool((fitness == fitness[0]).all()):
        warnings.warn(
            f"all {len(fitness)} members of generation {generation} have the fitness {float(fitness[0])}: nothing can be learned "
            "from it, and the update is zero",
            stacklevel=4,
        )
        return torch.zeros_like(fitness)
    weights = require_fitness(shaping(fitness), len(fitness), "what fitness_shaping returned").cpu()
    if not bool(weights.isfinite().all()):
        raise ArgumentError("fitness_shaping returned weights that are not finite for fitness that is; the update would be lost")
    return weights
