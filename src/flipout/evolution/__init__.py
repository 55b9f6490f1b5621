"""Evolution strategies whose whole population runs through a module as one batch.

:class:`EvolutionStrategy` is the core: ``step(evaluate)`` fills ``.grad``, and any ``torch.optim`` optimiser does the rest. What
follows it here serves reinforcement learning, exploration, saving, and machines by the dozen.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flipout.evolution.characters import character_tokenizer
from flipout.evolution.checkpoint import load_checkpoint, save_checkpoint
from flipout.evolution.exploration import ParameterNoise, noisy
from flipout.evolution.language import TokenReward
from flipout.evolution.members import Members
from flipout.evolution.observations import ObservationNormalizer
from flipout.evolution.strategy import EvolutionStrategy
from flipout.evolution.text import TextRewards
from flipout.evolution.zeroth_order import ZerothOrder
from flipout.renamed import renamed

if TYPE_CHECKING:
    from flipout.evolution.ray import RayWorkers
    from flipout.evolution.rollouts import Rollouts
    from flipout.evolution.trainer import ZerothOrderTrainer

__all__ = [
    "EvolutionStrategy",
    "Members",
    "ObservationNormalizer",
    "ParameterNoise",
    "RayWorkers",
    "Rollouts",
    "TokenReward",
    "TextRewards",
    "ZerothOrder",
    "ZerothOrderTrainer",
    "character_tokenizer",
    "load_checkpoint",
    "noisy",
    "save_checkpoint",
]

#: What needs a package that the library does not: where it is, the package, and the extra. Imported when it is asked for.
_OPTIONAL = {
    "Rollouts": ("flipout.evolution.rollouts", "gymnasium", "rl"),
    "RayWorkers": ("flipout.evolution.ray", "ray", "ray"),
    "ZerothOrderTrainer": ("flipout.evolution.trainer", "transformers", "loops"),
}


#: Deprecated names, and what they are called now.
_RENAMED = {"Generation": "TokenReward"}


def __getattr__(name: str) -> Any:
    if name not in _OPTIONAL:
        return renamed(__name__, name, _RENAMED)
    module, package, extra = _OPTIONAL[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        needed = f"{__name__}.{name} needs {package}, which is not installed: pip install 'flipout[{extra}]'"
        raise ModuleNotFoundError(needed, name=error.name) from error
