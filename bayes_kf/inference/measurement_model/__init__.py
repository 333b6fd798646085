"""The measurement model: noise, directions of the outputs, expansion at the mode, gate, predictive density."""
