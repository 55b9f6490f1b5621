"""Evolution strategies whose whole population runs through a module as one batch.

:class:`EvolutionStrategy` is the core: ``step(evaluate)`` fills ``.grad``, and any ``torch.optim`` optimiser does the rest. What
follows it here serves reinforcement learning, exploration, and saving.
"""

from typing import TYPE_CHECKING, Any

from flipout.evolution.members import Members
from flipout.evolution.normalization import ObservationNormalizer
from flipout.evolution.strategy import EvolutionStrategy

if TYPE_CHECKING:
    from flipout.evolution.rollouts import Rollouts

__all__ = ["EvolutionStrategy", "Members", "ObservationNormalizer", "Rollouts"]


def __getattr__(name: str) -> Any:
    """What needs a package that the library does not is imported when it is asked for."""
    if name == "Rollouts":
        from flipout.evolution.rollouts import Rollouts

        return Rollouts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
