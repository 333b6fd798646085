"""The distribution of a regression's targets under a posterior."""
