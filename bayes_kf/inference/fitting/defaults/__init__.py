"""What a fit without a config chooses from the data and the model."""
