"""Scores of class probabilities: likelihood, entropy, selective prediction, out-of-distribution detection."""
