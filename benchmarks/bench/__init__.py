"""One bench for every optimizer: a file of ``optimizers/`` for each row, a file of ``problems/`` for each data set."""
