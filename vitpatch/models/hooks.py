"""Hooks that read or replace a module's tensors by name, and a forward pass that ends at a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Act = Callable[[Tensor], Tensor | None]
"""What is done with a value; what it returns, unless ``None``, goes on in its place."""


class HookPoint(NamedTuple):
    """Where a value passes: the input of a module, else its output; all of it, or one third of its channels.

    A third is the queries, keys or values of one projection to all three.
    """

    module: nn.Module
    is_input: bool
    third: int | None = None


@contextmanager
def attached(act: Act, point: HookPoint) -> Iterator[None]:
    """Inside the block ``act`` is called with the value that passes a hook point.

    It is called before all other hooks of the module and again after them: what a model's own hook records of a layer
    is the replaced value, and so is what goes on. An act that replaces must therefore give the same value twice.
    """

    def act_on(value: Tensor) -> Tensor | None:
        if point.third is None:
            return act(value)
        thirds = list(value.chunk(3, -1))
        new = act(thirds[point.third])
        if new is None:
            return None
        thirds[point.third] = new
        return torch.cat(thirds, -1)

    def on_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        new = act_on(first_argument(args, kwargs))
        if new is None:
            return None
        return replace_first_argument(args, kwargs, new)

    def on_output(module: nn.Module, args: tuple, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)  # attention returns its weights as a second output
        new = act_on(output[0] if is_tuple else output)
        return (new, *output[1:]) if is_tuple and new is not None else new

    with ExitStack() as hooks:
        for prepend in (True, False):
            if point.is_input:
                handle = point.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=prepend)
            else:
                handle = point.module.register_forward_hook(on_output, prepend=prepend)
            hooks.enter_context(handle)
        yield


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module of a transformer is called with, by position or as ``hidden_states``."""
    return args[0] if args else kwargs["hidden_states"]


def replace_first_argument(args: tuple, kwargs: dict[str, Any], new: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another tensor for ``first_argument``."""
    return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})


class _Stopped(Exception):
    """Ends a forward pass."""


def run_until(model: nn.Module, pixels: Tensor, point: HookPoint) -> Tensor | None:
    """The value that passes a hook point in a forward pass, which ends there; ``None`` if none passes."""
    values: list[Tensor] = []

    def keep(value: Tensor) -> None:
        values.append(value)
        if len(values) == 2:  # after all other hooks of the module
            raise _Stopped

    with attached(keep, point), suppress(_Stopped):
        model(pixel_values=pixels)
    return values[-1] if values else None
