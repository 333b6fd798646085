"""One file for each row; ``registry/optimizers.py`` documents its contents."""
