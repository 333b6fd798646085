"""Covariance structures, one a file: a Gaussian over θ conditioned on u = Mθ + ε."""
