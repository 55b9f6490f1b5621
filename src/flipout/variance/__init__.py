"""How much a stochastic gradient varies, under any estimator, on any module.

The gradient of one step is random twice over: in its batch and in its noise. Theory: Wen et al. 2018, Sec. 3.2.

* :func:`gradient_variance` draws both afresh again and again, and reports the variance of every weight's gradient;
* :func:`variance_curve` does so over batch sizes, and fits the law 1/N and the plateau;
* :func:`variance_components` estimates α, β and γ of Theorem 2, which predict all these curves;
* :func:`suggest_batch_size` says where larger batches stop paying, and :func:`suggest_bases` how many bases make them pay again.
"""

from __future__ import annotations

from flipout.intervals import Estimate
from flipout.variance.components import VarianceComponents, variance_components
from flipout.variance.curve import VarianceCurve, variance_curve
from flipout.variance.measure import gradient_variance
from flipout.variance.named import ESTIMATORS, named_estimators
from flipout.variance.results import EstimatorVariance, GradientVariance
from flipout.variance.sampling import without_replacement
from flipout.variance.suggest import BasesSuggestion, BatchSuggestion, suggest_bases, suggest_batch_size

__all__ = [
    "ESTIMATORS",
    "BasesSuggestion",
    "BatchSuggestion",
    "Estimate",
    "EstimatorVariance",
    "GradientVariance",
    "VarianceComponents",
    "VarianceCurve",
    "gradient_variance",
    "named_estimators",
    "suggest_bases",
    "suggest_batch_size",
    "variance_components",
    "variance_curve",
    "without_replacement",
]
