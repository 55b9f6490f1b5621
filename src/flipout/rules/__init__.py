"""Rules: how one torch operation meets a weight that differs per member. Importing this package fills the registry."""

from flipout.rules import (
    attention,
    conv,
    einsum,
    embedding,
    functions,
    linear,
    normalization,
    pointwise,
    recurrent,
    routed,
    scales,
    structure,
)

__all__ = [
    "attention",
    "conv",
    "einsum",
    "embedding",
    "functions",
    "linear",
    "normalization",
    "pointwise",
    "recurrent",
    "routed",
    "scales",
    "structure",
]
