"""The operators under the transforms of `torch.func`, and their word about forward derivatives.

`torch.library.register_autograd` knows no transforms, so that `torch.func.grad` over an operator
fails. Here the same derivative stands in an `autograd.Function` of the form that transforms take.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

# Operator -> what is called in its place; empty but for the time of an export.
_STAND_INS: dict[torch._ops.OpOverload, Callable] = {}


@contextlib.contextmanager
def stand_ins(functions: dict[torch._ops.OpOverload, Callable]) -> Iterator[None]:
    """Call functions of the same arguments in the place of operators."""
    _STAND_INS.update(functions)
    try:
        yield
    finally:
        _STAND_INS.clear()


def make_call(
    op: torch._ops.OpOverload, setup_context: Callable | None, backward: Callable
) -> Callable:
    """`op` as the functions of this package call it: transforms included.

    Reverse transforms (`grad`, `vjp`, `jacrev`) and `vmap` work; a second derivative raises as it
    does without transforms. Forward derivatives (`jvp`, `jacfwd`, dual tensors) raise
    `NotImplementedError`: without that they would be silently zero.
    """
    function = _make_function(op, setup_context, backward)

    def call(*args, **kwargs):
        if _STAND_INS and op in _STAND_INS:
            return _STAND_INS[op](*args, **kwargs)
        if torch.compiler.is_compiling():
            return op(*args, **kwargs)
        if forward_ad._current_level >= 0:
            _refuse_tangents(op, (args, kwargs))
        if not torch._C._are_functorch_transforms_active():
            return op(*args, **kwargs)
        leaves, structure = tree_flatten(_complete(op, args, kwargs))
        result = function.apply(*leaves, structure)
        return list(result) if _returns_list(op) else result

    return call


def _refuse_tangents(op, inputs) -> None:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and forward_ad.unpack_dual(leaf).tangent is not None:
            raise NotImplementedError(f"{op._schema.name} has no forward derivative (jvp)")


def _returns_list(op) -> bool:
    return str(op._schema.returns[0].type) == "List[Tensor]"


def _complete(op, args, kwargs) -> tuple[tuple, dict]:
    """Positional and keyword-only arguments, with those left out at their defaults."""
    named = {x.name: x for x in op._schema.arguments}
    position = [name for name, x in named.items() if not x.kwarg_only]
    given = {**dict(zip(position, args, strict=False)), **kwargs}
    values = {name: given.get(name, x.default_value) for name, x in named.items()}
    return tuple(values.pop(name) for name in position), values


def _make_function(op, setup_context, backward) -> type[torch.autograd.Function]:
    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs):
            *leaves, structure = inputs
            args, kwargs = tree_unflatten(leaves, structure)
            result = op(*args, **kwargs)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def setup_context(ctx, inputs, output):
            *leaves, structure = inputs
            args, kwargs = tree_unflatten(leaves, structure)
            ctx.counts = [len(tree_leaves(value)) for value in args]
            ctx.rest = len(leaves) - sum(ctx.counts)
            if setup_context is None:
                return
            if kwargs:
                setup_context(ctx, args, kwargs, output)
            else:
                setup_context(ctx, args, output)

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            result = result if isinstance(result, tuple) else (result,)
            found = []
            for value, count in zip(result, ctx.counts, strict=True):
                found += value if isinstance(value, (list, tuple)) else [value] * count
            return (*found, *[None] * (ctx.rest + 1))  # keyword arguments, structure

    Transformed.__name__ = f"Transformed_{op._schema.name.split('::')[1]}"
    return Transformed
