"""Recalibration maps and conformal prediction, fitted on held-out data."""
