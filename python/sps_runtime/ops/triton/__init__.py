"""Operators for GPUs in Triton. Importing a module of this package imports triton; nothing else
does. Under ``TRITON_INTERPRET=1`` all of them run on CPU tensors, which is how they are tested.

`operators.TritonOperators` is what layers use. A module holds one idea: its kernels, and the
functions over tensors that launch them.
"""
