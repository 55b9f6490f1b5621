"""flipout: every example of a mini-batch gets its own random weights (Wen et al., ICLR 2018)."""

from flipout import bayes, evolution, regularize, variance
from flipout.decay import parameter_groups
from flipout.distributions import FromDistribution
from flipout.draw import Draw
from flipout.errors import (
    ArgumentError,
    BatchError,
    DecayWarning,
    DrawError,
    FlipoutError,
    MemberError,
    MissingRuleError,
    NotFiniteError,
    PrecisionWarning,
    UnmetWarning,
    UnsupportedNoiseError,
    VerificationError,
)
from flipout.estimators import Estimator, Flipout, Independent, LocalReparameterization, LowRank, Shared
from flipout.in_place import perturbed
from flipout.noise import DropConnect, Gaussian, MultiplicativeGaussian, Noise, Rademacher
from flipout.perturb import Perturbed
from flipout.registry import rule
from flipout.verification import Report, verify
from flipout.weight import PerturbedWeight

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BatchError",
    "DecayWarning",
    "Draw",
    "DrawError",
    "DropConnect",
    "Estimator",
    "Flipout",
    "FlipoutError",
    "FromDistribution",
    "Gaussian",
    "Independent",
    "LocalReparameterization",
    "LowRank",
    "MemberError",
    "MissingRuleError",
    "MultiplicativeGaussian",
    "Noise",
    "NotFiniteError",
    "PrecisionWarning",
    "Perturbed",
    "PerturbedWeight",
    "Rademacher",
    "Report",
    "Shared",
    "UnmetWarning",
    "UnsupportedNoiseError",
    "VerificationError",
    "bayes",
    "evolution",
    "parameter_groups",
    "perturbed",
    "regularize",
    "rule",
    "variance",
    "verify",
]
