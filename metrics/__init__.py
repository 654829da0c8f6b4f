"""How near made images are to real ones: features, distances of sets and of pairs, and what such numbers are worth."""
