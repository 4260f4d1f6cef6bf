"""``PatchableViT``: a Hugging Face vision transformer with named sites, run by its own modules.

Nothing of the model is converted. It can be run whole, with hooks that live inside a ``with`` and go by name, never by
firing order; or by its parts – embeddings, each block's attention and MLP, readout – which is what the executor does.
That both give the same logits, ``vitpatch.models.verify`` shows when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.models import configs
from vitpatch.models.block import Block, Surroundings
from vitpatch.models.families import EVERYTHING, PATCHES, POOLED, Family, Readout
from vitpatch.models.hooks import Act, attach
from vitpatch.models.patch_embedding import PatchEmbedding, found_in
from vitpatch.models.preprocessing import Preprocessing
from vitpatch.models.readout import Reader
from vitpatch.types import Site, Sizes

Place = tuple[Site, int]
"""A site of a layer."""

NOT_STEPWISE = "run by its parts this model has other logits; every patch is a full forward pass"
NOT_BY_HEADS = "attention taken apart by head has other values; every patch of heads is a full forward pass"

HOOKED = (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST, Site.Z, Site.Q, Site.K, Site.V)
"""Sites that are a module's input or output, and so can be read and replaced by a hook."""


class PatchableViT(nn.Module):
    """A vision transformer classifier whose sites can be recorded and replaced.

    ``readout`` is one of the model's heads (default: all of the classifier's). ``input_size`` (height, width) of the
    pixels, where it is not the config's. Of the result: ``blocks``; ``label_names`` by class index, or ``None`` where
    the checkpoint has none or there is a ``label_doubt``; ``notes`` on what its probabilities are; ``sizes`` are what a
    plan must know; ``reader`` is the first of the family's readouts that this model has the modules of, until the proof
    has found the one that gives its logits; ``stepwise`` says whether the parts do; ``missing`` are sites without a
    module, or whose module is never run. Raises ``VitPatchError`` where the family's row does not fit the modules, or
    the outputs are no logits of classes.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        preprocessing: Preprocessing | None = None,
        readout: str | None = None,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.family, self.preprocessing, self.head = family, preprocessing, readout
        self.classes = configs.classes_of(model, {head for readout in family.readouts for head in readout.heads})
        self.label_names, self.label_doubt = configs.class_names(model.config)
        self.notes = configs.notes_on(model)
        self._modules_of_blocks = self._find_blocks()
        self.family = family = _of_this_version(family, self._modules_of_blocks[0])
        size, patch = configs.geometry(model)
        if not family.any_size and size is not None:
            input_size = size
        self.input_size = input_size or size or (224, 224)
        self._patch = patch
        self._embedding = found_in(model, patch)
        self._grid = tuple(pixels // step for pixels, step in zip(self.input_size, patch, strict=True))
        self.stepwise = True
        shape = (1, 3, 1, 1)
        mean, std = (preprocessing.mean, preprocessing.std) if preprocessing else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)
        self._heads = self._number_of_heads()
        self._look_around()
        self.readers = self._find_readers()
        self.reader = self.readers[0]
        self.missing = {site for site in HOOKED if not all(block.has(site) for block in self.blocks)}

    def _find_blocks(self) -> list[nn.Module]:
        try:
            found = list(self.model.get_submodule(self.family.blocks))
            for block in found:
                for path in (self.family.norm1, self.family.attention, self.family.norm2, *self.family.mlp):
                    block.get_submodule(path)
        except (AttributeError, TypeError) as error:
            raise VitPatchError(f"{self._name}: its blocks are not where the row says ({error})") from error
        if not found:
            raise VitPatchError(f"{self._name}: {self.family.blocks} has no block")
        return found

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} as {self.family.name}"

    def _number_of_heads(self) -> int:
        config, attention = self._vision, self._modules_of_blocks[0].get_submodule(self.family.attention)
        for owner in (config, attention):
            for name in ("num_attention_heads", "num_heads"):
                if isinstance(number := getattr(owner, name, None), int):
                    return number
        raise VitPatchError(f"{self._name}: neither its config nor its attention says the number of heads")

    @property
    def _vision(self) -> Any:
        return configs.vision_config(self.model.config)

    def _find_readers(self) -> list[Reader]:
        """Of the family's readouts those that the model has all modules of, and the asked head."""
        present = {name for name, _ in self.model.named_modules()}
        found = [readout for readout in self.family.readouts if present >= readout.modules and self._has(readout)]
        if not found:
            heads = " or ".join(" + ".join(readout.heads) for readout in self.family.readouts)
            raise VitPatchError(f"{type(self.model).__name__}: an image classifier of {self.family.name} has {heads}")
        if self.head is not None:
            names = {name for readout in found for name in readout.heads}
            if self.head not in names:
                known = ", ".join(sorted(names))
                raise VitPatchError(f"model.readout {self.head!r}: the model has {known}; null is all of them together")
            found = [
                replace(readout, heads={self.head: readout.heads[self.head]})
                for readout in found
                if self.head in readout.heads
            ]
        return [Reader(self.model, readout, self._special, self.tokens) for readout in found]

    def _has(self, readout: Readout) -> bool:
        """Whether the model has the special tokens that a readout reads."""
        parts = {part for parts in readout.heads.values() for part in parts}
        return parts <= {*self._special, PATCHES, EVERYTHING, POOLED}

    @property
    def sizes(self) -> Sizes:
        """What a plan must know."""
        return Sizes(len(self.blocks), self._heads, self._special, self._grid, self.reader.reads)

    def require(self, site: Site) -> None:
        """Raises ``VitPatchError`` for a site that the family does not have."""
        if site in self.missing:
            has = ", ".join(known for known in HOOKED if known not in self.missing)
            raise VitPatchError(f"target={site}: {self.family.name} has no such values; it has {has}")

    def caveat(self, site: Site) -> str | None:
        """Why patches of a site are full forward passes, where they are."""
        if self.goes_by_parts(site):
            return None
        return f"{self.family.name}: {NOT_BY_HEADS if self.stepwise else NOT_STEPWISE}"

    def goes_by_parts(self, site: Site) -> bool:
        """Whether patches of a site need no full forward pass."""
        return self.stepwise and (self.by_heads or not site.by_head)

    @property
    def by_heads(self) -> bool:
        """Whether attention is the one of the formula in all blocks."""
        return all(block.by_heads for block in self.blocks)

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the attention scores."""
        return any(block.has_bias for block in self.blocks)

    @by_heads.setter
    def by_heads(self, is_so: bool) -> None:
        for block in self.blocks:
            block.by_heads = is_so

    @property
    def weights_digest(self) -> str:
        """Sixteen hex digits of all weights by name, type, shape and value."""
        if not hasattr(self, "_weights_digest"):
            self._weights_digest = configs.digest_of_weights(self.model)
        return self._weights_digest

    @property
    def checkpoint_digest(self) -> str:
        """The same without what is made from the labels of the data: it names the checkpoint."""
        is_whole = not hasattr(self.model, "made_of_labels")
        return self.weights_digest if is_whole else configs.digest_of_checkpoint(self.model)

    @property
    def config_digest(self) -> str:
        """Sixteen hex digits of what the config says of the architecture: heads, activation, epsilons and the like."""
        return configs.digest_of_config(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.model.parameters()).dtype

    def covered(self, masks: Tensor | None) -> Tensor | None:
        """Of masks (batch, 1, height, width) what the image patches cover, without a rest at the right and below."""
        if masks is None:
            return None
        rows, columns = (number * step for number, step in zip(self._grid, self._patch, strict=True))
        return masks[..., :rows, :columns]

    def normalize(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] → what the model takes, in its own type."""
        return ((images - self.mean) / self.std).to(self.dtype)

    @property
    def patch_embedding(self) -> PatchEmbedding:
        """Where patches are embedded. Raises ``VitPatchError`` where that is no convolution."""
        if self._embedding is None:
            raise VitPatchError(
                f"corruption embedding_noise: {self.family.name} embeds its patches without a convolution of their "
                "size; use a corruption of pixels"
            )
        return self._embedding

    @property
    def embedded(self) -> tuple[int, int]:
        """(patches, width) of an image's patch embeddings. Raises ``VitPatchError`` as ``patch_embedding`` does."""
        return self._grid[0] * self._grid[1], self.patch_embedding.width

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        """Normalised pixels → patch embeddings before positions are added, (batch, patches, width)."""
        return self.patch_embedding.of(self.model, pixels)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels (batch, 3, height, width) → logits (batch, classes).

        ``noise`` (batch, patches, width) is added to the patch embeddings, before positions are.
        """
        with self._adding(noise):
            return self._logits(pixels)

    def _adding(self, noise: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if noise is None else self.patch_embedding.adding(noise)

    def _logits(self, pixels: Tensor) -> Tensor:
        if self.head is None:
            return self.model(pixel_values=pixels).logits
        logits: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            logits.append(output)

        handle = self.model.get_submodule(self.head).register_forward_hook(keep)
        try:
            self.model(pixel_values=pixels)
        finally:
            handle.remove()
        return logits[-1]

    # --- by parts ---

    def embed(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels → the stream that enters the first block, (batch, tokens, width); ``noise`` as above."""
        if self._looked_from != self.device:
            self._look_around()

        def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handle = self._modules_of_blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with self._adding(noise):
                self.model(pixel_values=pixels)
        except _Reached as reached:
            return reached.stream
        finally:
            handle.remove()
        raise VitPatchError(f"{self._name}: its first block is never run")

    @torch.no_grad()
    def _look_around(self) -> None:
        """One forward pass of a blank image: the token axis, and what the blocks' attention is given besides it."""
        family, given, biases = self.family, [{} for _ in self._modules_of_blocks], {}
        handles, streams = [], []

        def note_call(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                given[number] |= {"args": args, "kwargs": kwargs}

            return hook

        def note_bias(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                biases[number] = output.detach().clone().reshape(-1, *output.shape[-3:])

            return hook

        def note_stream(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            streams.append(args[0] if args else kwargs["hidden_states"])

        handles.append(self._modules_of_blocks[0].register_forward_pre_hook(note_stream, with_kwargs=True))
        for number, block in enumerate(self._modules_of_blocks):
            attention = block.get_submodule(family.attention)
            handles.append(attention.register_forward_pre_hook(note_call(number), with_kwargs=True))
            if (bias := _submodule(block, family.bias)) is not None:
                handles.append(bias.register_forward_hook(note_bias(number)))
        if (shared := _submodule(self.model, family.shared_bias)) is not None:
            handles.append(shared.register_forward_hook(note_bias(-1)))
        try:
            self.model(pixel_values=torch.zeros(1, 3, *self.input_size, device=self.device, dtype=self.dtype))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = one_line(error, 160)
            raise VitPatchError(f"{self._name}: cannot be run on {self.input_size} pixels ({reason})") from error
        finally:
            for handle in handles:
                handle.remove()
        if not streams or not all(given):
            raise VitPatchError(f"{self._name}: its blocks or their attention are never run")
        self.tokens, self.width = streams[0].shape[1:]
        self._special = self._names_of_special()
        self._looked_from = self.device
        # by formula unless it was seen not to be
        keep = [block.by_heads for block in self.blocks] if hasattr(self, "blocks") else None
        self.blocks = [
            Block(block, family, self._heads, self._surroundings(given[number], biases, number))
            for number, block in enumerate(self._modules_of_blocks)
        ]
        if keep is not None:
            self.by_heads = all(keep)

    def _surroundings(self, call: dict[str, Any], biases: dict[int, Tensor], number: int) -> Surroundings:
        here = [biases[at] for at in (number, -1) if at in biases]
        rotary = call["kwargs"].get(self.family.rotary) if self.family.rotary else None
        return Surroundings(call["args"], call["kwargs"], sum(here) if here else None, rotary)

    def _names_of_special(self) -> tuple[str, ...]:
        """The tokens before the patches: as many of the row's names as there are, then the registers."""
        patches = self._grid[0] * self._grid[1]
        registers = int(configs.said(self.model, self.family.registers or "") or 0)
        named = self.tokens - patches - registers
        if not 0 <= named <= len(self.family.special):
            raise VitPatchError(
                f"{self._name}: {self.tokens} tokens are not {patches} patches, {registers} registers and "
                f"{', '.join(self.family.special) or 'nothing'} before them"
            )
        return (*self.family.special[:named], *(f"register{i}" for i in range(registers)))

    def readout(self, stream: Tensor) -> Tensor:
        """The last stream at the tokens that are read, (rows, reads, width) → logits (rows, classes)."""
        return self.reader(stream)

    # --- whole, with hooks ---

    @contextmanager
    def hooked(self, acts: Mapping[Place, Act]) -> Iterator[None]:
        """Shows each act its place's value (batch, tokens, channels); what it returns, unless ``None``, goes on.

        ``resid_mid`` can be read here, not replaced: what is replaced in front of the MLP's norm is not the stream.
        """
        handles = []
        try:
            for place, act in acts.items():
                handles.append(attach(act, *self.blocks[place[1]].hook_point(place[0])))
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


class _Reached(Exception):
    """Stops a forward pass at the first block."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


def _submodule(module: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a path, or ``None`` where there is none."""
    try:
        return None if path is None else module.get_submodule(path)
    except AttributeError:
        return None


def _of_this_version(family: Family, block: nn.Module) -> Family:
    """The family's row with the names that the attention's modules have in this version of transformers."""
    rows = (family, *(replace(family, **names) for names in family.versions))
    return next((r for r in rows if _submodule(block, f"{r.attention}.{r.output}") is not None), family)
