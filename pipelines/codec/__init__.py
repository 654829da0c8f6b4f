"""Codes as files (docs/format.md): images become bytes as few as the prior is good, and come back or are refused."""
