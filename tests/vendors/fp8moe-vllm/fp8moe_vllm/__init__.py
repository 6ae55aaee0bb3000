"""vLLM's own FP8 mixture-of-experts classes as backends of fp8moe; importing this imports neither torch nor vLLM."""
