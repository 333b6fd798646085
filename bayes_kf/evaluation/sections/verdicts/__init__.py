"""Scores in sentences, one module for each section of a report."""
