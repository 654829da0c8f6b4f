"""Objectives: what a VAE is trained by."""
