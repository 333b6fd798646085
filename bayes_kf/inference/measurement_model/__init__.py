"""From outputs and targets to a linear measurement: noise, output directions, expansion at the mode."""
