"""VAEs whose latents come in groups z_1, ..., z_L, the top one first: p(z) = prod_l p(z_l | z_above)."""
