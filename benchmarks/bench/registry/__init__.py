"""Optimizers and problems of the bench, found by listing their folders."""
