"""Times of backends on a device, taken so that two of them can be compared: what the gate and regret rest on."""
