"""Choice of settings: a bank of filters, selection on a stream and on held-out data."""
