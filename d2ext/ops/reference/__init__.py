"""PyTorch implementations of the operators: run without compiled kernels, and test oracles.

The functions take the arguments of the operator schemas and are differentiable nowhere: the
gradient formulas are written out in the `*_backward` functions, as in the compiled kernels.
"""
