"""Give a module of somebody else's another forward, in place, and take it away again.

What changes is the class of that one instance: to a subclass of its own with a mixin before it. So
parameters, names, ``state_dict``, hooks, wrappers around it and ``isinstance`` stay as they were,
and so does the signature of its forward, which trainers and generation ask for.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import nn

__all__ = ["Reclassed", "reclass", "restore"]


class Reclassed:
    """Base of the mixins, which bring a method ``run``: the new forward.

    In it, ``super().forward`` is the module's own.

    Attributes:
        own: The class that the module had.
        prefix: Put before the name of that class to name the new one.
    """

    own: ClassVar[type]
    prefix: ClassVar[str] = "Accelerated"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as an instance of the module's own class: the new one is in no file to import."""
        mixin = type(self).__bases__[0]
        make, arguments, *state = super().__reduce_ex__(protocol)
        if arguments and arguments[0] is type(self):
            arguments = (self.own, *arguments[1:])
        return (_remake, (mixin, make, arguments), *state)


def reclass(module: nn.Module, mixin: type[Reclassed]) -> None:
    """Mix ``mixin`` into the class of ``module``; nothing happens if it is there already."""
    if not isinstance(module, mixin):
        _become(module, _reclassed(mixin, type(module)))


def restore(module: nn.Module) -> None:
    """Give ``module`` its own class back, if :func:`reclass` changed it."""
    if isinstance(module, Reclassed):
        _become(module, type(module).own)


def _become(module: Any, new: type) -> None:
    module.__class__ = new
    # Hooks of the library accelerate, for models on several devices, hold the forward they found.
    held = vars(module).get("_old_forward")
    if getattr(held, "__self__", None) is module:
        vars(module)["_old_forward"] = module.__class__.forward.__get__(module)


@functools.cache
def _reclassed(mixin: Any, own: Any) -> type:
    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    names = {
        "own": own,
        "forward": forward,
        "__module__": own.__module__,
        "__doc__": own.__doc__,
        "__qualname__": mixin.prefix + own.__qualname__,
    }
    return type(mixin.prefix + own.__name__, (mixin, own), names)


def _remake(mixin: type[Reclassed], make: Any, arguments: tuple[Any, ...]) -> Any:
    module = make(*arguments)
    reclass(module, mixin)
    return module
