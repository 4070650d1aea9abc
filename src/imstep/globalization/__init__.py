"""How far to go and how much to damp: rules on plain numbers."""

from imstep.globalization.armijo import Armijo, FixedStep
from imstep.globalization.batch_size import NormTest
from imstep.globalization.contraction import ContractionDamping
from imstep.globalization.cubic import AdaptiveCubic
from imstep.globalization.damping import Damping, LevenbergMarquardt, NoDamping
from imstep.globalization.estimate import ErrorEstimate, ExactEstimate, RunningEstimate
from imstep.globalization.model import LineDerivatives, LineModel, Trial
from imstep.globalization.search import Bracket, Reason, SearchState, StepSearch, Verdict, decrease_ratio
from imstep.globalization.taylor import TaylorMonitor
from imstep.globalization.trust_region import TrustRegion
from imstep.globalization.wolfe import StrongWolfe

__all__ = [
    "AdaptiveCubic",
    "Armijo",
    "Bracket",
    "ContractionDamping",
    "Damping",
    "ErrorEstimate",
    "ExactEstimate",
    "FixedStep",
    "LevenbergMarquardt",
    "LineDerivatives",
    "LineModel",
    "NoDamping",
    "NormTest",
    "Reason",
    "RunningEstimate",
    "SearchState",
    "StepSearch",
    "StrongWolfe",
    "TaylorMonitor",
    "Trial",
    "TrustRegion",
    "Verdict",
    "decrease_ratio",
]
