"""Figures and tables of the papers, measured again."""
