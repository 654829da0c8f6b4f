"""`zellige report`: one self-contained page on runs and models."""
