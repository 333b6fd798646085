"""What several benchmarks use: data, networks, result files, the command line."""
