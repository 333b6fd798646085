"""One file a row; found by listing the folder (``bench.rows`` says what a file holds)."""
