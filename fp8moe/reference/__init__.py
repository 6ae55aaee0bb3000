"""Oracles that share no code: `ideal` (float64, no quantisation of activations), `recipe` (the declared quantisation)."""
