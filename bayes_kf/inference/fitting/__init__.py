"""Loops over data loaders: passes, selection, checkpoints, the filter bank."""
