"""The operator library `d2ext`: schemas, loading of the compiled kernels, registration helper.

Every schema stands once, here in Python. The compiled extension holds kernels for the dispatch keys
CPU and CUDA only; the PyTorch implementation of an operator is registered under
CompositeExplicitAutograd, a key the dispatcher reaches when a device has no kernel of its own.
Hence no function of this package asks whether the extension is there.
"""

import glob
import os
import warnings
from collections.abc import Callable

import torch
from torch.library import Library

from d2ext.ops._transforms import make_call

_LIBRARY = Library("d2ext", "DEF")
_OPERATORS: dict[str, Callable] = {}  # by name, as `define_op` returns them


def _load_extension() -> str:
    """Load the compiled kernels and say in a few words what came of it."""
    if os.environ.get("D2EXT_DISABLE_EXT", "0") not in ("", "0"):
        return "switched off by D2EXT_DISABLE_EXT"
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = sorted(
        glob.glob(os.path.join(package, "_C*.so")) + glob.glob(os.path.join(package, "_C*.pyd"))
    )
    if not found:
        return "not built"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"d2ext.ops: {found[0]} cannot be loaded ({reason});"
            " the PyTorch implementations are used."
            " Rebuild it for this torch: python setup.py build_ext --inplace",
            stacklevel=2,
        )
        return f"cannot be loaded: {reason}"
    return "loaded"


EXTENSION_STATE = _load_extension()


def has_native() -> bool:
    """True when the compiled kernels are loaded."""
    return EXTENSION_STATE == "loaded"


def operators() -> tuple[str, ...]:
    """Names of the operators defined so far, backward operators included."""
    return tuple(_OPERATORS)


def operator(name: str) -> Callable:
    """Operator `name` as `define_op` returned it."""
    return _OPERATORS[name]


def implementation(name: str, device: str) -> tuple[str, str]:
    """Which code runs operator `name` on `device` ("cpu" or "cuda"), and why.

    Returns:
        ("native", reason) or ("pytorch", reason).
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"d2ext::{name}", key):
        return "native", "compiled kernel"
    if not has_native():
        return "pytorch", f"extension {EXTENSION_STATE}"
    return "pytorch", f"extension built without {key}"


def define_op(
    name: str,
    signature: str,
    *,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define `d2ext::name` with all it needs to run, trace, compile and differentiate.

    Args:
        signature: arguments and returns in schema syntax, without the name.
        reference: PyTorch implementation, run where no compiled kernel is registered.
        fake: shape function for tracing and compiling.
        setup_context, backward: as in `torch.library.register_autograd`. Without `backward`
            a gradient asked of the operator raises `NotImplementedError`.

    Returns:
        The operator, also for the transforms of `torch.func`.
    """
    try:
        _LIBRARY.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError:
        if not has_native():
            raise
        raise RuntimeError(
            f"d2ext.ops: the compiled kernel of {name} is of another version of the sources;"
            " rebuild it: python setup.py build_ext --inplace"
        ) from None
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"d2ext::{name}", fake, lib=_LIBRARY)
    if backward is None:

        def backward(ctx, *grads):
            raise NotImplementedError(f"d2ext::{name} has no derivative")

    torch.library.register_autograd(
        f"d2ext::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    _OPERATORS[name] = make_call(getattr(torch.ops.d2ext, name).default, setup_context, backward)
    return _OPERATORS[name]
