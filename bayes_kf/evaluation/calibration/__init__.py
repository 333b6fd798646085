"""Calibration errors, their intervals and their null distribution."""
