"""A real language model on questions with options, and what posteriors over its adapter are worth there."""
