"""Predictions of a fitted posterior: moments, draws, text, ArviZ."""
