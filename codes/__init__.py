"""Codes and how they lie in files: the one thing that stage one and stage two share."""
