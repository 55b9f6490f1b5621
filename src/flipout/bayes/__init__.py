"""Bayesian networks with mean-field posteriors: learnable Gaussian noise, priors and their KL, the ELBO, and prediction.

The posterior of a weight is the law of W̄ + ΔW that its noise describes. So a Bayesian net is a :class:`flipout.Perturbed` with
``Gaussian(std, learnable=True)``, trained on the negative ELBO (Blundell et al. 2015):

    loss = nll + KL(q ‖ prior) / dataset size
"""

from typing import Any

from flipout.bayes.adapters import fixed_noise, random_adapters
from flipout.bayes.curvature import DiagonalHessian, diagonal_hessian
from flipout.bayes.elbo import Elbo, elbo_loss, require_finite
from flipout.bayes.ivon import IVON
from flipout.bayes.kl import kl_by_parameter, kl_divergence
from flipout.bayes.likelihood import gaussian_nll, joint_log_likelihood
from flipout.bayes.metrics import accuracy, brier_score, calibration_error, negative_log_likelihood, ood_auroc
from flipout.bayes.plots import plot_band, plot_reliability
from flipout.bayes.posterior import from_pretrained
from flipout.bayes.prediction import Classification, Regression, predict, sample_outputs
from flipout.bayes.priors import LogUniform, ScaleMixture, centred_prior
from flipout.bayes.schedules import cyclical_annealing, linear_annealing, minibatch_weight
from flipout.renamed import renamed

__all__ = [
    "IVON",
    "Classification",
    "DiagonalHessian",
    "Elbo",
    "LogUniform",
    "Regression",
    "ScaleMixture",
    "accuracy",
    "brier_score",
    "calibration_error",
    "centred_prior",
    "cyclical_annealing",
    "diagonal_hessian",
    "elbo_loss",
    "fixed_noise",
    "from_pretrained",
    "gaussian_nll",
    "joint_log_likelihood",
    "kl_by_parameter",
    "kl_divergence",
    "linear_annealing",
    "minibatch_weight",
    "negative_log_likelihood",
    "ood_auroc",
    "plot_band",
    "plot_reliability",
    "predict",
    "random_adapters",
    "require_finite",
    "sample_outputs",
]

#: Deprecated names, and what they are called now.
_RENAMED = {"draw_band": "plot_band", "draw_reliability": "plot_reliability"}


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, _RENAMED)
