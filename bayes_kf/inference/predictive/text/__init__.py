"""Text by a posterior over a causal language model: writing it, scoring it, choosing among answers."""
