"""The filter in Pyro: the model over the trainable tensors, the guide, and its inference algorithm."""
