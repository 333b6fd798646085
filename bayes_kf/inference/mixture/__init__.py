"""Mixtures of posteriors: their predictions, their files, and the class that users call."""
