"""One bench for every optimizer: rows in ``optimizers/``, data sets in ``problems/``, a file each."""
