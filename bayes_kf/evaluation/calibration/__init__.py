"""Calibration errors, their null distributions, and confidence intervals."""
