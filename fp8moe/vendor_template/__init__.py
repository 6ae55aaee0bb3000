"""acme-moe: FP8 mixture-of-experts kernels, as a backend of fp8moe."""
