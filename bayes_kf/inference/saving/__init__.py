"""A posterior as a folder on disk."""
