"""Passes over a data set: of the filter, of Gauss-Newton and of the mean; refits of the noise and the prior."""
