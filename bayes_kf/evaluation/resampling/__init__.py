"""Bins and simulated nulls. They know no score."""
