"""The operator library `d2ext`: schemas, loading of the compiled kernels, registration helper.

Every schema stands once, here in Python. The compiled extension holds kernels for the dispatch keys
CPU and CUDA only; the PyTorch implementation of an operator is registered under
CompositeExplicitAutograd, a key the dispatcher reaches when a device has no kernel of its own.
Hence no function of this package asks whether the extension is there.
"""

import glob
import importlib
import os
import re
import warnings
from collections.abc import Callable

import torch
from torch.library import Library

from d2ext.ops._architectures import fits
from d2ext.ops._transforms import make_call

_LIBRARY = Library("d2ext", "DEF")
_OPERATORS: dict[str, Callable] = {}  # by name, as `define_op` returns them
_REFERENCES: dict[str, Callable] = {}
_REPLACED: dict[str, str] = {}  # dispatch keys whose kernels `use_references` took out, and why
_REBUILD = (
    "`python setup.py build_ext --inplace` in a clone, otherwise"
    " `pip install --no-build-isolation --no-deps --force-reinstall` of the sdist or the clone"
)


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
        reason = _reason(error)
        warnings.warn(
            f"d2ext.ops: {found[0]} cannot be loaded: {reason};"
            f" the PyTorch implementations are used. Build it for torch {torch.__version__}:"
            f" {_REBUILD}",
            stacklevel=2,
        )
        return f"cannot be loaded: {reason}"
    return "loaded"


def _reason(error: BaseException) -> str:
    """What the loader said, in one line; torch raises an error of its own from it."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).splitlines()[0]
    symbol = re.search(r"(?:undefined symbol|symbol not found.*?):? '?(\w+)", text)
    return f"built for another torch, which had the symbol {symbol[1]}" if symbol else text


def _built_for() -> str:
    """GPU architectures of the loaded kernels, as in `TORCH_CUDA_ARCH_LIST`; "" without CUDA."""
    try:
        return importlib.import_module("d2ext._C").ARCHITECTURES if has_native() else ""
    except (ImportError, AttributeError):  # no module, or one of older sources
        return ""


EXTENSION_STATE = _load_extension()


def has_native() -> bool:
    """True when the compiled kernels are loaded."""
    return EXTENSION_STATE == "loaded"


ARCHITECTURES = _built_for()


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
    if key in _REPLACED:
        return "pytorch", _REPLACED[key]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"d2ext::{name}", key):
        return "native", "compiled kernel"
    if not has_native():
        return "pytorch", f"extension {EXTENSION_STATE}"
    return "pytorch", f"extension built without {key}"


def use_references(key: str, reason: str) -> None:
    """Put the PyTorch implementations in the place of the kernels of a dispatch key, e.g. CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch names every kernel that is replaced
        for name, reference in _REFERENCES.items():
            _LIBRARY.impl(name, reference, key)
    _REPLACED[key] = reason


def check_devices() -> None:
    """Take the PyTorch implementations, with a warning, when a visible GPU cannot run the kernels.

    CUDA has to be initialized, or about to be.
    """
    if not ARCHITECTURES or "CUDA" in _REPLACED:
        return
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not fits(ARCHITECTURES, capability):
            gpu = "{} is {}.{}".format(torch.cuda.get_device_name(device), *capability)
            reason = f"kernels built for {ARCHITECTURES}, {gpu}"
            use_references("CUDA", reason)
            warnings.warn(
                f"d2ext.ops: {reason}; the PyTorch implementations are used on GPUs."
                f" Build on the machine of this GPU, or with TORCH_CUDA_ARCH_LIST: {_REBUILD}",
                stacklevel=2,
            )
            return


def watch_devices() -> None:
    """Call `check_devices` when CUDA is initialized: importing must not do that, as processes could
    no longer be forked."""
    if ARCHITECTURES:
        torch.cuda._lazy_call(check_devices)


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
            f" rebuild it: {_REBUILD}"
        ) from None
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _REFERENCES[name] = reference
    torch.library.register_fake(f"d2ext::{name}", fake, lib=_LIBRARY)
    if backward is None:

        def backward(ctx, *grads):
            raise NotImplementedError(f"d2ext::{name} has no derivative")

    torch.library.register_autograd(
        f"d2ext::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
    _OPERATORS[name] = make_call(getattr(torch.ops.d2ext, name).default, setup_context, backward)
    return _OPERATORS[name]
