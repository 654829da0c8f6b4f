"""Likelihood VAEs that know classes, of which only some images say theirs."""
