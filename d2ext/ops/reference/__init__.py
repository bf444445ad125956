"""PyTorch implementations of the operators: what runs without a compiled kernel, and the test oracles.

The functions take the arguments of the operator schemas and are differentiable nowhere: the gradient
formulas are written out in the ``*_backward`` functions, as in the compiled kernels.
"""
