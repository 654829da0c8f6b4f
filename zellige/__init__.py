"""Zellige's public page: what scripts import."""
