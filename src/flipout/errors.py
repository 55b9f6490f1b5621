"""The library's errors and warnings. Each says what was found, why it cannot work and what to do next."""

__all__ = [
    "ArgumentError",
    "BatchError",
    "DecayWarning",
    "DownloadError",
    "DrawError",
    "EvaluationError",
    "FlipoutError",
    "MemberError",
    "MissingRuleError",
    "NotFiniteError",
    "OutOfMemoryError",
    "PrecisionWarning",
    "SaveError",
    "UnmetWarning",
    "UnsupportedNoiseError",
    "VerificationError",
]


class FlipoutError(Exception):
    """Base of every error that flipout raises on purpose.

    Example:
        >>> import flipout
        >>> try:
        ...     flipout.Gaussian(-1.0)
        ... except FlipoutError as error:
        ...     print(type(error).__name__)
        ArgumentError
    """


class ArgumentError(FlipoutError, ValueError):
    """An argument cannot mean anything: a scale that is not positive, a pattern that matches nothing.

    Example:
        >>> import flipout
        >>> flipout.DropConnect(1.5)
        Traceback (most recent call last):
            ...
        flipout.errors.ArgumentError: DropConnect(p=1.5): p is a probability of dropping, 0 < p < 1
    """


class UnsupportedNoiseError(FlipoutError, ValueError):
    """An estimator cannot serve this noise, or this use of a weight, without bias.

    Example:
        >>> import torch, flipout
        >>> flipout.Perturbed(torch.nn.Linear(3, 2), flipout.DropConnect(0.2))(torch.ones(4, 3))
        Traceback (most recent call last):
            ...
        flipout.errors.UnsupportedNoiseError: ...
    """


class MissingRuleError(FlipoutError, NotImplementedError):
    """A torch operation met a perturbed weight and no rule says what that means.

    Example:
        >>> import torch, flipout
        >>> class Inverse(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x @ self.weight.inverse()
        >>> flipout.Perturbed(Inverse(2, 2), flipout.Gaussian(0.1))(torch.ones(4, 2))
        Traceback (most recent call last):
            ...
        flipout.errors.MissingRuleError: ...
    """


class BatchError(FlipoutError, ValueError):
    """The rows of a tensor cannot be matched to the members of the draw.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
        >>> with net.hold(members=4):
        ...     net(torch.ones(6, 3))
        Traceback (most recent call last):
            ...
        flipout.errors.BatchError: ...
    """


class MemberError(FlipoutError, IndexError):
    """A member index lies outside the draw.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
        >>> with net.hold(members=4) as draw:
        ...     draw.weights(4)
        Traceback (most recent call last):
            ...
        flipout.errors.MemberError: ...
    """


class DrawError(FlipoutError, RuntimeError):
    """A draw is used outside its life: held twice, or asked for members before any are known.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.1))
        >>> with net.hold(members=4), net.hold(members=4):
        ...     pass
        Traceback (most recent call last):
            ...
        flipout.errors.DrawError: ...
    """


class NotFiniteError(FlipoutError, ArithmeticError):
    """A loss is NaN or infinite, and training cannot go on from it.

    Example:
        >>> import torch, flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(2, 1), flipout.Gaussian(0.1))
        >>> flipout.bayes.require_finite(net, torch.tensor(float("nan")))
        Traceback (most recent call last):
            ...
        flipout.errors.NotFiniteError: ...
    """


class EvaluationError(FlipoutError, RuntimeError):
    """Fitness could not be had: an environment raised, or workers kept failing.

    Example:
        >>> issubclass(EvaluationError, RuntimeError) and issubclass(EvaluationError, FlipoutError)
        True
    """


class DecayWarning(UserWarning):
    """An optimiser applies weight decay to learnable noise scales, so the noise grows at every step.

    Example:
        >>> import torch, flipout, warnings
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(0.01, learnable=True))
        >>> optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     optimiser.step()
        >>> caught[0].category.__name__
        'DecayWarning'
        >>> optimiser = torch.optim.AdamW(net.parameter_groups(weight_decay=0.1))  # the scales are kept out of it
        >>> optimiser.step()
    """


class DownloadError(FlipoutError, OSError):
    """A file cannot be had from the network.

    Example:
        >>> issubclass(DownloadError, OSError) and issubclass(DownloadError, FlipoutError)
        True
    """


class OutOfMemoryError(FlipoutError, MemoryError):
    """Memory does not suffice for a step. What was saved before it is kept.

    Example:
        >>> issubclass(OutOfMemoryError, MemoryError) and issubclass(OutOfMemoryError, FlipoutError)
        True
    """


class PrecisionWarning(UserWarning):
    """Noise was asked for in a precision in which this device multiplies no faster, so it keeps the precision of the mean.

    Example:
        >>> issubclass(PrecisionWarning, UserWarning)
        True
    """


class SaveError(FlipoutError, OSError):
    """A file cannot be written, on a full disk for one. The version saved before it is kept.

    Example:
        >>> issubclass(SaveError, OSError) and issubclass(SaveError, FlipoutError)
        True
    """


class UnmetWarning(UserWarning):
    """A perturbed parameter met no operation in a call, so that its noise had no effect.

    Example:
        >>> issubclass(UnmetWarning, UserWarning)
        True
    """


class VerificationError(FlipoutError, AssertionError):
    """A row of a perturbed net is not that of the plain module with its weights.

    Example:
        >>> import torch, flipout
        >>> class Centred(torch.nn.Linear):  # looks at the whole batch
        ...     def forward(self, x):
        ...         return super().forward(x - x.mean(0))
        >>> flipout.verify(flipout.Perturbed(Centred(3, 2), flipout.Gaussian(0.1)), torch.randn(4, 3))
        Traceback (most recent call last):
            ...
        flipout.errors.VerificationError: ...
    """
