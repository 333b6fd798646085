"""Evaluation of a language model on text that exists: the loss of each token against the entropy that it had."""
