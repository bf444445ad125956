"""Hooks and callbacks that a program gives to `train`."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from d2ext.errors import UserError

from detectron2.engine import HookBase

Hook: TypeAlias = HookBase | Callable[[Any], None]

logger = logging.getLogger(__name__)


class UserHooks(HookBase):
    """Runs several hooks in their order, and keeps the states of those that have one.

    Args:
        hooks: detectron2's `HookBase` objects, or functions that are called with the trainer
            after every step. Whichever has `state_dict` and `load_state_dict` is saved in
            checkpoints, by the name of its class, and restored by a resumed training.

    Raises:
        UserError: something is neither.
    """

    def __init__(self, hooks: Iterable[Hook]):
        self._given = list(hooks)
        for hook in self._given:
            if isinstance(hook, type) or not (isinstance(hook, HookBase) or callable(hook)):
                raise UserError(
                    f"hooks has {hook!r}; it takes objects of detectron2's HookBase and functions "
                    "of the trainer"
                )

    def _each(self, method: str) -> None:
        for hook in self._given:
            if isinstance(hook, HookBase):
                hook.trainer = self.trainer  # the weak reference that detectron2 made
                getattr(hook, method, lambda: None)()

    def before_train(self):
        self._each("before_train")

    def after_train(self):
        self._each("after_train")

    def before_step(self):
        self._each("before_step")

    def after_backward(self):
        """Called by the trainer between the backward pass and the step of the optimiser."""
        self._each("after_backward")

    def after_step(self):
        for hook in self._given:
            if isinstance(hook, HookBase):
                hook.trainer = self.trainer
                hook.after_step()
            else:
                hook(self.trainer)

    def _named(self) -> dict[str, Hook]:
        """Hooks by the name of their class; from the second of a class on with a number."""
        named: dict[str, Hook] = {}
        for hook in self._given:
            base = getattr(hook, "__qualname__", type(hook).__qualname__)
            same = sum(name.partition("#")[0] == base for name in named)
            named[f"{base}#{same + 1}" if same else base] = hook
        return named

    def state_dict(self) -> dict[str, Any]:
        states = {
            name: hook.state_dict()
            for name, hook in self._named().items()
            if hasattr(hook, "state_dict")
        }
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        named = self._named()
        for name, state in state_dict.items():
            hook: Any = named.get(name)
            if hasattr(hook, "load_state_dict"):
                hook.load_state_dict(state)
            else:
                logger.warning("no hook %s is given now: what it had stored is left out", name)


def as_hooks(hooks: Sequence[Hook]) -> list[HookBase]:
    """What to register with the trainer for the hooks of a program."""
    return [UserHooks(hooks)] if hooks else []
