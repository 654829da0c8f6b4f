"""Likelihood VAEs of tables: rows of numbers, some of which may be missing, and rows of counts."""
