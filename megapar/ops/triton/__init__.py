"""The ops as Triton kernels: one file an op, with the name it has in `megapar/ops`."""
