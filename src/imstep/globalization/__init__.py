"""How far to go and how much to damp: rules on plain numbers."""

from imstep.globalization.armijo import Armijo, FixedStep
from imstep.globalization.damping import Damping, LevenbergMarquardt, NoDamping
from imstep.globalization.model import LineModel
from imstep.globalization.search import Reason, SearchState, StepSearch, Verdict
from imstep.globalization.taylor import TaylorMonitor

__all__ = [
    "Armijo",
    "Damping",
    "FixedStep",
    "LevenbergMarquardt",
    "LineModel",
    "NoDamping",
    "Reason",
    "SearchState",
    "StepSearch",
    "TaylorMonitor",
    "Verdict",
]
