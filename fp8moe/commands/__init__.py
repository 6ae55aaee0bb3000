"""What the `fp8moe` command does behind its options; each module is imported when its command runs."""
