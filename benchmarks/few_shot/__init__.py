"""A CLIP model learns classes from a few images each."""
