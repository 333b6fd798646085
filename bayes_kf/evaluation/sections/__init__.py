"""Sections of a report: numbers, figures and sentences."""
