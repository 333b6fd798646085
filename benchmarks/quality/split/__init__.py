"""Posteriors on development sets, which may be looked at, and on sealed sets, which are opened once."""
