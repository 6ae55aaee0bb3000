"""From the checkpoint's layout to each kernel's own: pure functions, tested by reading back, without the library."""
