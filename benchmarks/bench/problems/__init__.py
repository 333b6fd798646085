"""One file a data set; found by listing the folder (``bench.problem`` says what a file holds)."""
