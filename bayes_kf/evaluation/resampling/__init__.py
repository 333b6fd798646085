"""Bins and simulated null distributions, independent of any score."""
