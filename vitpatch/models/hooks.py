"""A hook that shows an act a module's tensor, and puts back what the act makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Act = Callable[[Tensor], Tensor | None]
"""What is done with a value; what it returns, unless ``None``, goes on in its place."""


def attach(act: Act, module: nn.Module, is_input: bool, third: int | None = None) -> RemovableHandle:
    """Shows ``act`` the module's input (else its output), or one third of its channels: q, k, v projected together."""
    if third is not None:
        act = _on_third(act, third)
    if is_input:
        return module.register_forward_pre_hook(_on_input(act), with_kwargs=True)
    return module.register_forward_hook(_on_output(act))


def _on_output(act: Act) -> Callable[..., Any]:
    """On the output, or the first of a tuple of them: attention gives its weights beside it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = act(output[0] if is_tuple else output)
        if new is None:
            return output
        return (new, *output[1:]) if is_tuple else new

    return hook


def _on_input(act: Act) -> Callable[..., Any]:
    """On the first argument, by position or as ``hidden_states``."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        new = act(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _on_third(act: Act, third: int) -> Act:
    """On one of queries, keys and values that are projected together."""

    def on_all(value: Tensor) -> Tensor | None:
        parts = list(value.chunk(3, -1))
        new = act(parts[third])
        if new is None:
            return None
        parts[third] = new
        return torch.cat(parts, -1)

    return on_all
