"""The `Report` object, its files and its HTML page."""
