"""KL divergences from the posterior of a net's weights to a prior.

Closed forms are those of ``torch.distributions``, by pairs of types, and :class:`~flipout.bayes.LogUniform` adds one. A pair of
your own goes into the same registry, with ``torch.distributions.register_kl``. A pair that is not there is estimated.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints, register_kl
from torch.distributions import kl_divergence as closed_form

from flipout.arguments import broadcasts, require_count
from flipout.bayes.dawson import dawson_integral
from flipout.bayes.posterior import Posterior, posteriors, require_net
from flipout.bayes.priors import LogUniform
from flipout.errors import ArgumentError
from flipout.noise import Gaussian
from flipout.perturb import Perturbed

__all__ = ["Prior", "kl_by_parameter", "kl_divergence"]

#: One law for all weights, or laws by parameter name pattern, of which the first match wins.
Prior = Distribution | Mapping[str, Distribution]


def kl_divergence(net: Perturbed, prior: Prior, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """KL(q ‖ p) of all random weights of a net, in nats: a sum over entries, each parameter once however often it is used.

    Exact where the pair of laws has a closed form: Gaussian posteriors with Normal, Laplace and
    :class:`~flipout.bayes.LogUniform` priors among others. Elsewhere (:class:`~flipout.bayes.ScaleMixture`, say) it is the mean
    over ``samples`` draws of

        Σ_ij log q(W_ij) - log p(W_ij),     W = W̄ + ΔW ~ q

    which is unbiased, and differentiated along the draw (reparameterisation). Parameters that are not random have no KL.

    Args:
        net: its noise is the posterior; learnable or not.
        prior: a law of ``torch.distributions`` over real scalars whose parameters broadcast to the weights, or a dict from name
            patterns to laws.
        samples: draws where there is no closed form.
        generator: of these; None for the net's own.

    Returns:
        A 0-d tensor, differentiable in the means and the learnable scales.

    Raises:
        ArgumentError: for a prior on a parameter that is not random, a random parameter without a prior, a posterior or a prior
            that makes the KL infinite.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(1.0, learnable=True))
        >>> _ = [torch.nn.init.ones_(p) for p in net.module.parameters()]
        >>> round(kl_divergence(net, Normal(0.0, 1.0)).item(), 5)  # 8 weights, each 1 away from the prior's mean
        4.0
    """
    parts = list(kl_by_parameter(net, prior, samples, generator).values())
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def kl_by_parameter(net: Perturbed, prior: Prior, samples: int = 1, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """The summands of :func:`kl_divergence` by parameter name; a tied parameter has its first name alone.

    Example:
        >>> import flipout
        >>> net = flipout.Perturbed(torch.nn.Linear(3, 2), flipout.Gaussian(1.0))
        >>> sorted(kl_by_parameter(net, Normal(0.0, 1.0)))
        ['bias', 'weight']
    """
    require_count("samples", samples, 1)
    found = list(posteriors(net))
    laws = _assigned(net, found, prior)
    source = net.generator if generator is None else generator
    return {each.name: _kl(each, laws[each.name], samples, source) for each in found}


@register_kl(Normal, LogUniform)  # type: ignore[untyped-decorator]
def _kl_normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    return dawson_integral(q.loc.abs() / (q.scale * math.sqrt(2.0)))


def _kl(posterior: Posterior, prior: Distribution, samples: int, generator: torch.Generator | None) -> Tensor:
    _require_finite_kl(posterior, prior)
    law = posterior.law()
    if law is not None:
        try:
            return closed_form(law, prior).sum()
        except NotImplementedError:
            pass
    total = torch.zeros((), dtype=posterior.mean.dtype, device=posterior.mean.device)
    for _ in range(samples):
        weight, density = posterior.sample(generator)
        total = total + (density - prior.log_prob(weight)).sum()
    return total / samples


def _assigned(net: Perturbed, found: Sequence[Posterior], prior: Any) -> dict[str, Distribution]:
    """The prior of each random parameter."""
    laws = dict(prior) if isinstance(prior, Mapping) else {"*": prior}
    for pattern, law in laws.items():
        _require_law(pattern, law)
        if not any(_matches(each, pattern) for each in found):
            _refuse_pattern(net, found, pattern)
    chosen = {}
    for each in found:
        law = next((law for pattern, law in laws.items() if _matches(each, pattern)), None)
        if law is None:
            raise ArgumentError(
                f"parameter {each.name!r} is random and has no prior: the patterns {list(laws)} leave it out; add one, or '*'"
            )
        _require_shape(each, law)
        chosen[each.name] = law
    return chosen


def _matches(posterior: Posterior, pattern: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in posterior.names)


def _require_law(pattern: str, law: Any) -> None:
    if not isinstance(law, Distribution):
        raise ArgumentError(
            f"the prior for {pattern!r} is {law!r}; expected a law such as torch.distributions.Normal(0.0, 1.0), or a dict of them"
        )
    if law.event_shape:
        raise ArgumentError(f"the prior for {pattern!r} is {law}, a law of vectors; give the law of one entry")


def _require_shape(posterior: Posterior, law: Distribution) -> None:
    if not broadcasts(law.batch_shape, posterior.mean.shape):
        raise ArgumentError(
            f"the prior of {posterior.name!r} has the shape {tuple(law.batch_shape)}, which does not broadcast to the weight's "
            f"{tuple(posterior.mean.shape)}"
        )


def _refuse_pattern(net: Perturbed, found: Sequence[Posterior], pattern: str) -> None:
    still = [name for name, _ in require_net(net).module.named_parameters(remove_duplicate=False) if fnmatchcase(name, pattern)]
    random = [each.name for each in found]
    if still:
        raise ArgumentError(
            f"the prior for {pattern!r} is on {', '.join(map(repr, still[:3]))}, which is not random, so it has no posterior and "
            "no KL: give it noise, or leave the prior out (weight decay is the optimiser's)"
        )
    near = difflib.get_close_matches(pattern, random, n=3, cutoff=0.0)
    raise ArgumentError(f"the prior for {pattern!r} matches no parameter; the nearest random ones are {', '.join(map(repr, near))}")


def _require_finite_kl(posterior: Posterior, prior: Distribution) -> None:
    noise, name = posterior.noise, posterior.name
    if noise.discrete:
        raise ArgumentError(
            f"{name!r} has the noise {noise}, whose law is discrete: its KL to a prior with a density is infinite; take Gaussian "
            "noise"
        )
    if isinstance(noise, Gaussian) and not _over_all_reals(prior, posterior.mean):
        raise ArgumentError(
            f"the prior of {name!r} is {prior}, which is not over all reals as the posterior is: the KL is infinite; take another"
        )
    if noise.relative and not torch.compiler.is_compiling() and bool((posterior.mean == 0).any()):
        raise ArgumentError(
            f"{name!r} has weights of zero under relative noise, which have no spread: the KL is infinite; exclude it (biases "
            "often start at zero), or give it additive noise, which flipout.bayes.from_pretrained does with a floor"
        )
    if (
        callable(noise.std)
        and posterior.log_std is None
        and not torch.compiler.is_compiling()
        and bool((posterior.scale == 0).any())
    ):
        raise ArgumentError(f"{name!r} has weights whose scale, a function of them, is zero: the KL is infinite; add a floor to it")


def _over_all_reals(prior: Distribution, like: Tensor) -> bool:
    """Whether a law has a density far out on both sides; a mixture does not say so by its type."""
    support: Any = prior.support
    if support is constraints.real or support.is_discrete:
        return not support.is_discrete
    return all(bool(support.check(like.new_full(prior.batch_shape, far)).all()) for far in (-1e6, 0.0, 1e6))
