"""Posteriors as folders on disk."""
