"""Evolution strategies whose whole population runs through a module as one batch.

:class:`EvolutionStrategy` is the core: ``step(evaluate)`` fills ``.grad``, and any ``torch.optim`` optimiser does the rest. What follows
it here serves reinforcement learning, exploration, and saving.
"""

from flipout.evolution.members import Members
from flipout.evolution.strategy import EvolutionStrategy

__all__ = ["EvolutionStrategy", "Members"]
