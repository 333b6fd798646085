"""Scores of predicted real values: CRPS, PIT, coverage, quantiles, ENCE."""
