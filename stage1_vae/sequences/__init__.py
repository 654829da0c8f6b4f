"""Likelihood VAEs of sequences: texts, line by line, and drawings of a pen, stroke by stroke."""
