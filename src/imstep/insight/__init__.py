"""What a trained model's curvature says of its data, its certainty and its weights.

    from imstep import insight
    insight.influence(H, losses, target)        # of each training example on a loss
    insight.Laplace(F, cases, precision)        # a posterior, and error bars of predictions
    insight.saliencies(H)                       # what leaving out a weight costs
    insight.parameter_covariance(residuals, x)  # error bars of a fit
"""

from imstep.insight.covariance import ParameterCovariance, parameter_covariance
from imstep.insight.influence import influence
from imstep.insight.laplace import Laplace, Predictive
from imstep.insight.saliency import Removal, Saliencies, removal, saliencies

__all__ = [
    "Laplace",
    "ParameterCovariance",
    "Predictive",
    "Removal",
    "Saliencies",
    "influence",
    "parameter_covariance",
    "removal",
    "saliencies",
]
