"""Frames on the GPU: compressed bytes go there, and rows of bright-field pixels are made there.

``kernels.cu`` holds the kernels, ``runtime`` is all that is asked of CUDA, ``decode`` puts them to use. All but the
runtime is tested without a GPU: the tests compile the kernels for the host, and give ``decode`` another runtime, where
mistakes in the order of copies and kernels show.

LZ4 blocks are unpacked by a kernel of our own, not by nvCOMP. Its batched C interface could take them as they lie, but
its calls have changed from one major version to the next, a binding to it cannot be tried without a device, and what it
says of damaged blocks is its own affair: here CPU and GPU must agree about every frame, to the last bit.
"""
