"""Where a model makes patch embeddings of pixels: the one convolution whose kernel is a patch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from vitpatch.errors import VitPatchError
from vitpatch.models.preprocessing import pair


@dataclass(frozen=True)
class PatchEmbedding:
    """The convolution of a model, its output read and changed as (batch, patches, width), patches row by row.

    Positions and special tokens come after it.
    """

    module: nn.Conv2d

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

        handle = self.module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def of(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, height, width) → embeddings (batch, patches, width); nothing else is run."""

        def stop(module: nn.Module, args: tuple, output: Tensor) -> None:
            raise _Embedded(output)

        handle = self.module.register_forward_hook(stop)
        try:
            model(pixel_values=pixels)
        except _Embedded as reached:
            return reached.output.flatten(2).transpose(1, 2)
        finally:
            handle.remove()
        raise VitPatchError(f"{type(model).__name__}: the convolution that fits its patches is never run")


class _Embedded(Exception):
    """Stops a forward pass behind the convolution."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def found_in(model: nn.Module, patch: tuple[int, int]) -> PatchEmbedding | None:
    """The convolution of three colours whose kernel is a patch (height, width); ``None`` unless there is just one."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    fitting = [module for module in convolutions if pair(module.kernel_size) == patch]
    return PatchEmbedding(fitting[0]) if len(fitting) == 1 else None
