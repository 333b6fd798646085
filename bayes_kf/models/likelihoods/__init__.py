"""One likelihood p(y | η) a file; :mod:`bayes_kf.models.likelihood` lists them and says what each offers."""
