"""Size and sharpness of a posterior, chosen by held-out data."""
