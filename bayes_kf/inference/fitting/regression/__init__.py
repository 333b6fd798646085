"""The fit of real targets without a config: steps of Adam, and the prior's scales and σ² by their evidence."""
