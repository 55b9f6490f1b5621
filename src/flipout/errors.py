"""The library's errors. Each says what was found, why it cannot work and what to do next."""

__all__ = [
    "ArgumentError",
    "BatchError",
    "DownloadError",
    "DrawError",
    "EvaluationError",
    "FlipoutError",
    "MemberError",
    "MissingRuleError",
    "NotFiniteError",
    "OutOfMemoryError",
    "SaveError",
    "UnsupportedNoiseError",
]


class FlipoutError(Exception):
    """Base of every error that flipout raises on purpose."""


class ArgumentError(FlipoutError, ValueError):
    """An argument cannot mean anything: a scale that is not positive, a pattern that matches nothing."""


class UnsupportedNoiseError(FlipoutError, ValueError):
    """An estimator cannot serve this noise, or this use of a weight, without bias."""


class MissingRuleError(FlipoutError, NotImplementedError):
    """A torch operation met a perturbed weight and no rule says what that means."""


class BatchError(FlipoutError, ValueError):
    """The rows of a tensor cannot be matched to the members of the draw."""


class MemberError(FlipoutError, IndexError):
    """A member index lies outside the draw."""


class DrawError(FlipoutError, RuntimeError):
    """A draw is used outside its life: held twice, or asked for members before any are known."""


class NotFiniteError(FlipoutError, ArithmeticError):
    """A loss is NaN or infinite, and training cannot go on from it."""


class EvaluationError(FlipoutError, RuntimeError):
    """Fitness could not be had: an environment raised, or workers kept failing."""


class DownloadError(FlipoutError, OSError):
    """A file cannot be had from the network."""


class OutOfMemoryError(FlipoutError, MemoryError):
    """Memory does not suffice for a step. What was saved before it is kept."""


class SaveError(FlipoutError, OSError):
    """A file cannot be written, on a full disk for one. The version saved before it is kept."""
