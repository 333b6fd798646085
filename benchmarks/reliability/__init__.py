"""Faults, kills, load and reproducibility."""
