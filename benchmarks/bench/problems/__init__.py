"""One file for each data set; ``registry/problems.py`` documents its contents."""
