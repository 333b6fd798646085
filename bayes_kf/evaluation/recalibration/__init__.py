"""Maps and conformal sets that are fitted on held-out data."""
