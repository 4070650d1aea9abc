"""Training runs, baselines, comparisons, their records and reports."""
