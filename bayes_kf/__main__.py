"""``python -m bayes_kf`` is the command line."""

from bayes_kf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
