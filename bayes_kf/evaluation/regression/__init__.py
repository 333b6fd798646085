"""Scores of predicted numbers: CRPS, PIT, coverage, ENCE."""
