"""Time and memory of a step and of an evaluation."""
