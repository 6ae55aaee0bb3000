"""A device whose noise is that of a measured one, and samplers on it: the truth is known, so error rates can be."""
