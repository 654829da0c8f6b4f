"""How transformer priors draw their codes: one engine of blocks with a cache of keys and values, for all of them."""
