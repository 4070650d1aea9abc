"""What the paper's abstract claims, each with a measurement of a few seconds that can fail."""

from imstep.claims.claim import Claim, Figure, at_least, at_most
from imstep.claims.registry import CLAIMS

__all__ = ["CLAIMS", "Claim", "Figure", "at_least", "at_most"]
