"""What the paper's abstract claims, each with a measurement of a few seconds that can fail."""
