"""A mixture of posteriors in Pyro: the site ``member``, and under each of its values the sites of one Gaussian."""
