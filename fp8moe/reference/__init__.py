"""Two oracles that share no code: `ideal` (activations not quantised) and `recipe` (the declared quantisation)."""
