"""Hooks that read or replace a module's tensors, that stop a forward pass, and that add noise to patch embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitpatch.errors import VitPatchError
from vitpatch.models.preprocessing import pair

Act = Callable[[Tensor], Tensor | None]
"""What is done with a value; what it returns, unless ``None``, goes on in its place."""


@contextmanager
def attached(act: Act, module: nn.Module, is_input: bool, third: int | None = None) -> Iterator[None]:
    """Inside the block ``act`` is called with the module's input (else its output), or one third of its channels.

    It is called before all other hooks of the module and again after them: what a model's own hook records of a layer
    is the replaced value, and so is what goes on. An act that replaces must therefore give the same value twice.
    """
    act = act if third is None else _on_third(act, third)
    with ExitStack() as hooks:
        for prepend in (True, False):
            if is_input:
                handle = module.register_forward_pre_hook(_on_input(act), with_kwargs=True, prepend=prepend)
            else:
                handle = module.register_forward_hook(_on_output(act), prepend=prepend)
            hooks.enter_context(handle)
        yield


def _on_output(act: Act) -> Callable[..., Any]:
    """On the output, or the first of a tuple of outputs: attention returns its weights as a second one."""

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
        new = act(first_argument(args, kwargs))
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


def first_argument(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module of a transformer is called with, by position or as ``hidden_states``."""
    return args[0] if args else kwargs["hidden_states"]


class _Stopped(Exception):
    """Ends a forward pass at a module, with the value that is wanted of it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def run_until(model: nn.Module, pixels: Tensor, module: nn.Module, is_input: bool) -> Tensor | None:
    """The input (else the output) of a module in a forward pass, which ends there; ``None`` if it is never run."""

    def stop_before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Stopped(first_argument(args, kwargs))

    def stop_after(module: nn.Module, args: tuple, output: Tensor) -> None:
        raise _Stopped(output)

    if is_input:
        handle = module.register_forward_pre_hook(stop_before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(stop_after)
    with handle:
        try:
            model(pixel_values=pixels)
        except _Stopped as stopped:
            return stopped.value
    return None


@dataclass(frozen=True)
class PatchEmbedding:
    """The one convolution that makes patch embeddings of pixels, read and changed as (batch, patches, width).

    Patches are row by row. Positions and special tokens come after it.
    """

    module: nn.Conv2d

    @classmethod
    def of(cls, model: nn.Module, patch: tuple[int, int]) -> PatchEmbedding | None:
        """The convolution of three colours whose kernel is a patch (height, width); ``None`` unless it is just one."""
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
        fitting = [module for module in convolutions if pair(module.kernel_size) == patch]
        return cls(fitting[0]) if len(fitting) == 1 else None

    @property
    def width(self) -> int:
        """Values of a patch."""
        return self.module.out_channels

    @contextmanager
    def adding(self, noise: Tensor) -> Iterator[None]:
        """Adds ``noise`` (batch, patches, width) to the embeddings of forward passes made inside the block."""

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            batch, width, rows, columns = output.shape
            assert noise.shape == (batch, rows * columns, width), f"noise {tuple(noise.shape)} on {tuple(output.shape)}"
            return output + noise.transpose(1, 2).reshape(output.shape).to(output.device, output.dtype)

        with self.module.register_forward_hook(add, prepend=True):
            yield

    def embed(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, height, width) → embeddings (batch, patches, width); nothing else is run."""
        output = run_until(model, pixels, self.module, is_input=False)
        if output is None:
            raise VitPatchError(f"{type(model).__name__}: the convolution that fits its patches is never run")
        return output.flatten(2).transpose(1, 2)
