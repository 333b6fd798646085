"""Scores of streams: prequential loss, innovations, drift detection."""
