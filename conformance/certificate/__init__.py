"""A certificate: the evidence of a run at an edition's level, and a statement about it; written, read and verified."""
