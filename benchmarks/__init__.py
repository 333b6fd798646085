"""Benchmarks: ``python -m benchmarks.<part>.<script>``; ``README.md`` lists them."""
