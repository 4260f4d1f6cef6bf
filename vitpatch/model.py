"""``PatchableViT``: a Hugging Face vision transformer with named sites, run by its own modules.

Nothing of the model is converted. It can be run whole, with hooks that live inside a ``with`` and go by name, never by
firing order; or by its parts – embeddings, each block's attention and MLP, readout – which is what the executor does.
That both give the same logits, ``vitpatch.proof`` shows when the model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitpatch.anatomy import Family
from vitpatch.spec import ALL_HEADS, Site, Sizes, VitPatchError

Place = tuple[Site, int]
"""A site of a layer."""

HOOKED = (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST, Site.Z, Site.Q, Site.K, Site.V)
"""Sites that are a module's input or output, and so can be read and replaced by a hook."""


@dataclass(frozen=True)
class Preprocessing:
    """How images reach the model: the checkpoint's own image processor, its normalisation taken apart.

    ``to_input`` maps PIL RGB images to float32 (images, 3, height, width) in [0, 1]; ``mean`` and ``std`` (3,) are
    applied later, on the device, after the corruption.
    """

    processor: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_input(self, image: Any) -> Tensor:
        """One PIL RGB image → float32 (3, height, width) in [0, 1], after resize and crop."""
        pixels = self.processor(images=image, do_normalize=False, do_rescale=True, return_tensors="pt")["pixel_values"]
        return pixels[0].float()


@dataclass(frozen=True)
class Heads:
    """What attention computes by head, (rows, heads, tokens, head width) each.

    ``pattern`` (rows, heads, query tokens, key tokens) where it was asked for, ``z`` where it has been computed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Tensor | None = None
    z: Tensor | None = None

    def of(self, head: int) -> Heads:
        """One head, its axis kept, or all."""
        at = slice(None) if head == ALL_HEADS else slice(head, head + 1)
        return Heads(*(None if x is None else x[:, at] for x in (self.q, self.k, self.v, self.pattern, self.z)))

    def at(self, queries: slice) -> Heads:
        """The same at some query tokens; keys and values are of all tokens."""
        q, pattern, z = (None if x is None else x[:, :, queries] for x in (self.q, self.pattern, self.z))
        return Heads(q, self.k, self.v, pattern, z)

    def rows(self, rows: slice) -> Heads:
        """Some rows."""
        return Heads(*(None if x is None else x[rows] for x in (self.q, self.k, self.v, self.pattern, self.z)))


class PatchableViT(nn.Module):
    """A vision transformer classifier whose sites can be recorded and replaced.

    ``label_names`` by class index, or ``None`` where the checkpoint has none; ``weights_digest`` identifies the
    weights; ``sizes`` are what a plan must know; ``stepwise`` says whether the parts give the model's own logits.
    """

    def __init__(self, model: nn.Module, family: Family, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        self.model = model.eval()
        self.family, self.preprocessing = family, preprocessing
        self.classes = int(model.config.num_labels)
        self.label_names = _label_names(model.config)
        self.input_size = pair(model.config.image_size)  # (height, width) in pixels
        self._readout = self._find_readout()
        self.sizes = self._sizes()
        self.stepwise = True
        shape = (1, 3, 1, 1)
        mean, std = (preprocessing.mean, preprocessing.std) if preprocessing else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    def _find_readout(self) -> Mapping[str, int]:
        present = {name for name, _ in self.model.named_modules()}
        for readout in self.family.readouts:
            if present.issuperset(readout):
                return readout
        heads = " or ".join(" + ".join(readout) for readout in self.family.readouts)
        raise VitPatchError(f"{type(self.model).__name__}: an image classifier of {self.family.name} has {heads}")

    def _sizes(self) -> Sizes:
        patch = pair(self.model.config.patch_size)
        height, width = (size // step for size, step in zip(self.input_size, patch, strict=True))
        heads, reads = int(self.model.config.num_attention_heads), max(self._readout.values()) + 1
        return Sizes(len(self._blocks), heads, self.family.special, (height, width), reads)

    @property
    def weights_digest(self) -> str:
        """Sixteen hex digits of all weights by name, type, shape and value."""
        if not hasattr(self, "_weights_digest"):
            self._weights_digest = _digest_of_weights(self.model)
        return self._weights_digest

    @property
    def _blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.family.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.model.dtype

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP."""
        return int(self.model.config.intermediate_size)

    def normalize(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] → what the model takes, in its own type."""
        return ((images - self.mean) / self.std).to(self.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (batch, 3, height, width) → logits (batch, classes)."""
        return self.model(pixel_values=pixels).logits

    # --- by parts ---

    def _attention_part(self, layer: int, name: str = "") -> nn.Module:
        path = f"{self.family.attention}.{name}" if name else self.family.attention
        return self._blocks[layer].get_submodule(path)

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels → the stream that enters the first block, (batch, tokens, width)."""
        return self.model.get_submodule(self.family.embeddings)(pixels)

    def attention(self, layer: int, stream: Tensor, queries: int | None = None) -> Tensor:
        """What a block's attention adds to its ``stream`` (rows, tokens, width), at the first ``queries`` tokens."""
        if queries is None:
            normed = self._blocks[layer].get_submodule(self.family.norm1)(stream)
            return self._attention_part(layer)(normed)[0]
        heads = self.heads(layer, stream, queries)
        return self.project(layer, self.z(layer, heads))

    def heads(self, layer: int, stream: Tensor, queries: int | None = None, pattern: bool = False) -> Heads:
        """Queries, keys and values of a block by head, and the pattern where it is asked for."""
        normed = self._blocks[layer].get_submodule(self.family.norm1)(stream)

        def split(name: str, tokens: Tensor) -> Tensor:  # (rows, tokens, width) → (rows, heads, tokens, head width)
            projected = self._attention_part(layer, name)(tokens)
            return projected.unflatten(-1, (self.sizes.heads, -1)).transpose(1, 2)

        q = split(self.family.query, normed if queries is None else normed[:, :queries])
        heads = Heads(q, split(self.family.key, normed), split(self.family.value, normed))
        return Heads(heads.q, heads.k, heads.v, self.pattern(layer, heads)) if pattern else heads

    def _scaling(self, layer: int) -> float:
        return self._attention_part(layer).scaling

    def pattern(self, layer: int, heads: Heads) -> Tensor:
        """Attention probabilities (rows, heads, query tokens, key tokens), by the formula, in float32 inside."""
        scores = heads.q @ heads.k.transpose(-1, -2) * self._scaling(layer)
        return scores.softmax(-1, dtype=torch.float32).to(heads.v.dtype)

    def z(self, layer: int, heads: Heads) -> Tensor:
        """What attention hands to the output projection, (rows, heads, query tokens, head width)."""
        if heads.pattern is not None:
            return heads.pattern @ heads.v
        return F.scaled_dot_product_attention(heads.q, heads.k, heads.v, scale=self._scaling(layer))

    def project(self, layer: int, z: Tensor) -> Tensor:
        """The output projection of all heads' ``z``: (rows, tokens, width)."""
        return self._attention_part(layer, self.family.output)(z.transpose(1, 2).flatten(2))

    def project_change(self, layer: int, change: Tensor, head: int) -> Tensor:
        """What a ``change`` of ``z`` (rows, heads or 1, tokens, head width) adds to the output, (rows, tokens, width).

        Of one head only its own columns of the projection are needed.
        """
        weight = self._attention_part(layer, self.family.output).weight  # (width, heads · head width)
        if head != ALL_HEADS:
            weight = weight.unflatten(1, (self.sizes.heads, -1))[:, head]
        return F.linear(change.to(weight.dtype).transpose(1, 2).flatten(2), weight)

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """What a block's MLP adds to its ``stream`` (rows, tokens, width), token by token."""
        block = self._blocks[layer]
        return block.get_submodule(self.family.mlp)(block.get_submodule(self.family.norm2)(stream))

    def readout(self, stream: Tensor) -> Tensor:
        """The last stream at the tokens that are read, (rows, reads, width) → logits (rows, classes)."""
        return self._classify(self.model.get_submodule(self.family.norm)(stream))

    def _classify(self, normed: Tensor) -> Tensor:
        logits = [self.model.get_submodule(head)(normed[:, token]) for head, token in self._readout.items()]
        return logits[0] if len(logits) == 1 else sum(logits) / len(logits)

    def direct(self, stream: Tensor, change: Tensor) -> Tensor:
        """Logits (changes, rows, classes) of the last ``stream`` (rows, reads, width) with a ``change`` added to it.

        ``change`` (changes, rows, reads, width). The scale of the last layer norm stays that of ``stream``, so that
        the way is linear up to the classifier (the direct effect of Elhage et al. 2021, with a frozen layer norm).
        """
        norm = self.model.get_submodule(self.family.norm)
        wide = torch.promote_types(self.dtype, torch.float32)
        scale = (stream.to(wide).var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
        change = change.to(wide)
        moved = (change - change.mean(-1, keepdim=True)) * scale * norm.weight  # (changes, rows, reads, width)
        moved = norm(stream) + moved
        return self._classify(moved.flatten(0, 1).to(self.dtype)).unflatten(0, change.shape[:2])

    # --- whole, with hooks ---

    def _hook_point(self, place: Place) -> tuple[nn.Module, bool]:
        """The module, and whether the value is its input (else its output)."""
        (site, layer), family = place, self.family
        path, is_input = {
            Site.RESID_PRE: ("", True),
            Site.ATTN_OUT: (family.attention, False),
            Site.RESID_MID: (family.norm2, True),
            Site.MLP_OUT: (family.mlp, False),
            Site.RESID_POST: ("", False),
            Site.Z: (f"{family.attention}.{family.output}", True),
            Site.Q: (f"{family.attention}.{family.query}", False),
            Site.K: (f"{family.attention}.{family.key}", False),
            Site.V: (f"{family.attention}.{family.value}", False),
        }[site]
        return self._blocks[layer].get_submodule(path), is_input

    @contextmanager
    def hooked(self, acts: Mapping[Place, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
        """Shows each act its place's value (batch, tokens, channels); what it returns, unless ``None``, goes on.

        ``resid_mid`` can be read here, not replaced: what is replaced in front of the MLP's norm is not the stream.
        """
        handles = []
        try:
            for place, act in acts.items():
                module, is_input = self._hook_point(place)
                if is_input:
                    handles.append(module.register_forward_pre_hook(_on_input(act), with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(_on_output(act)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self, places: tuple[Place, ...]) -> Iterator[dict[Place, Tensor]]:
        """Collects the value of each place in the forward passes made inside the block."""
        values: dict[Place, Tensor] = {}

        def keep(place: Place) -> Callable[[Tensor], None]:
            return lambda value: values.__setitem__(place, value.detach())

        with self.hooked({place: keep(place) for place in places}):
            yield values

    @contextmanager
    def replacing(self, values: Mapping[Place, Tensor]) -> Iterator[None]:
        """Puts whole ``values`` at their places inside the block."""

        def put(new: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda value: new

        with self.hooked({place: put(new) for place, new in values.items()}):
            yield

    @torch.no_grad()
    def first_bad_layer(self, pixels: Tensor) -> int | None:
        """The first layer after which a value of this run is not finite, or ``None``."""
        places = tuple((Site.RESID_POST, layer) for layer in range(self.sizes.depth))
        with self.reading(places) as values:
            self(pixels)
        return next((layer for (_, layer), value in values.items() if not value.isfinite().all()), None)


def _on_output(act: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A forward hook that shows ``act`` the output's tensor and puts back what it returns; attention gives a tuple."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        new = act(output[0] if is_tuple else output)
        if new is None:
            return output
        return (new, *output[1:]) if is_tuple else new

    return hook


def _on_input(act: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """A hook on the first argument, by position or as ``hidden_states``."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        new = act(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return hook


def _label_names(config: Any) -> tuple[str, ...] | None:
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    unnamed = tuple(f"LABEL_{i}" for i in range(config.num_labels))
    return None if names == unnamed else names


def _digest_of_weights(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)
