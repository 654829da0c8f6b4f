"""Likelihood VAEs behind the commands: drawn from, judged, walked through."""
