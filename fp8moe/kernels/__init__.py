"""Our Triton kernels, one file a kernel: no policy, the same bits on every device and in Triton's interpreter.

Every launch passes `enable_fp_fusion=False`: a product is contracted into an fma only where the source says `tl.fma`.
Sizes that follow the batch are not specialised on, so that a new batch size compiles nothing.
`variants` lists what the launches compile, for devices that are not here.
Importing a module here imports triton, which decides at that moment whether the kernels are compiled or interpreted
(TRITON_INTERPRET=1).
"""
