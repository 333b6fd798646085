"""One file a data set; found by listing the folder (``bench.problems_found`` says what a file holds)."""
