"""Which posteriors and which report intervals deserve trust."""
