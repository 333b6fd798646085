"""Fits: from a model and a data loader to a posterior."""
