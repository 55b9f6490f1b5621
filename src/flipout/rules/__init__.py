"""Rules: how one torch operation meets a weight that differs per member. Importing this package fills the registry."""

from flipout.rules import attention, conv, embedding, linear, normalization, pointwise, recurrent, routed, structure

__all__ = ["attention", "conv", "embedding", "linear", "normalization", "pointwise", "recurrent", "routed", "structure"]
