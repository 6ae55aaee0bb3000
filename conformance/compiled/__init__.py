"""Compiled evidence: whether our kernels compile, for devices that need not be here, where the selector claims them.

    python -m conformance.compiled sm_90 gfx942             # a table
    python -m conformance.compiled sm_90:grouped_gemm --json

`targets` is the devices, `claims` what the predicate says of them, `compile` makes one kernel, `outcome` judges it,
`runner` does many in a process of their own. Nothing runs on a device, and no result here says that a kernel is right.
"""
