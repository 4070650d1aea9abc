"""Training runs, baselines, comparisons and their records."""
