"""Figures. Each function draws on an `ax` and returns it."""
