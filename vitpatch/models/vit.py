"""``PatchableViT``: a Hugging Face vision transformer with named sites, run by its own modules.

Nothing of the model is converted. It can be run whole, with hooks that live inside a ``with`` and find modules by name,
never by the order of calls; or by its parts – embeddings, each block's attention and MLP, readout – which is what the
executor does. ``vitpatch.models.verify`` checks when a model is loaded that both give the same logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vitpatch.errors import VitPatchError
from vitpatch.formatting import digest, one_line
from vitpatch.models.classes import Classes, number_of_classes, probability_notes
from vitpatch.models.families import EVERYTHING, PATCHES, POOLED, Family
from vitpatch.models.parts import Act, Block, CallArguments, HookPoint, Reader, attached, first_argument, run_until
from vitpatch.models.preprocessing import Preprocessing, config_value, image_and_patch_size, pair
from vitpatch.types import Site, Sizes

Place = tuple[Site, int]
"""A site of a layer."""

NOT_STEPWISE = "run by its parts this model has other logits; every patch is a full forward pass"
NOT_BY_HEADS = "attention taken apart by head has other values; every patch of heads is a full forward pass"

HOOKED = (Site.RESID_PRE, Site.ATTN_OUT, Site.MLP_OUT, Site.RESID_POST, Site.Z, Site.Q, Site.K, Site.V)
"""Sites that are a module's input or output, and so can be read and replaced by a hook."""
NOT_OF_THE_ARCHITECTURE = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "id2label", "label2id", "label_names",
)  # fmt: skip
"""Keys of a config that change no number of a run."""


class PatchableViT(nn.Module):
    """A vision transformer classifier whose sites can be read and replaced.

    ``readout`` is one of the model's heads (default: all of the classifier's, as the model combines them);
    ``input_size`` (height, width) is that of the pixels, for a model that takes any. Raises ``VitPatchError`` where the
    family's row does not fit the modules, or the outputs are no logits of classes.

    Attributes:
    - ``blocks``, ``tokens`` (how many), ``width`` of the stream, ``classes`` (how many).
    - ``label_names`` by class index; ``None`` where the checkpoint has none or contradicts itself.
    - ``notes``: lines on what its probabilities are.
    - ``readers``: the family's readouts that this model has the modules of; ``reader``: the one that is used.
    - ``missing``: sites without a module, or whose module is never run.
    - ``stepwise``: whether its parts give its own logits; ``verify_model`` finds this, ``by_heads`` and ``reader``.
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
        self.classes = number_of_classes(model, {head for readout in family.readouts for head in readout.heads})
        self.label_names = Classes.of(model.config).names
        self.notes = probability_notes(model)
        self.blocks = self._find_blocks()
        size, self._patch = image_and_patch_size(model)
        if not family.any_size and size is not None:
            input_size = size
        self.input_size = input_size or size or (224, 224)
        self._patch_convolutions = [
            module
            for module in model.modules()
            if isinstance(module, nn.Conv2d) and module.in_channels == 3 and pair(module.kernel_size) == self._patch
        ]
        self._grid = tuple(pixels // step for pixels, step in zip(self.input_size, self._patch, strict=True))
        self.stepwise = True
        mean, std = (preprocessing.mean, preprocessing.std) if preprocessing else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._record_calls()
        self.readers = self._find_readers()
        self.reader = self.readers[0]
        self.missing = {site for site in HOOKED if not all(block.has(site) for block in self.blocks)}

    def _find_blocks(self) -> list[Block]:
        try:
            modules = list(self.model.get_submodule(self.family.blocks))
            if not modules:
                raise AttributeError(f"{self.family.blocks} has no block")
            versions = [self.family, *(replace(self.family, **names) for names in self.family.versions)]
            self.family = next((row for row in versions if Block(modules[0], row, 0).has(Site.Z)), self.family)
            attention = modules[0].get_submodule(self.family.attention)
            self._heads = config_value(self.model, "num_attention_heads") or getattr(attention, "num_heads", None)
            blocks = [Block(module, self.family, self._heads) for module in modules]
        except (AttributeError, TypeError) as error:
            raise VitPatchError(f"{self._name}: its blocks are not where the row says ({error})") from error
        if self._heads is None:
            raise VitPatchError(f"{self._name}: neither its config nor its attention says the number of heads")
        return blocks

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} as {self.family.name}"

    def _find_readers(self) -> list[Reader]:
        """The family's readouts that the model has all modules and tokens of, reduced to the head asked for."""
        modules = {name for name, _ in self.model.named_modules(remove_duplicate=False)}
        parts = {*self._special, PATCHES, EVERYTHING, POOLED}
        readouts = [r for r in self.family.readouts if r.modules <= modules and r.parts <= parts]
        if not readouts:
            heads = " or ".join(" + ".join(readout.heads) for readout in self.family.readouts)
            raise VitPatchError(f"{type(self.model).__name__}: an image classifier of {self.family.name} has {heads}")
        if self.head is not None:
            names = {name for readout in readouts for name in readout.heads}
            if self.head not in names:
                known = ", ".join(sorted(names))
                raise VitPatchError(f"model.readout {self.head!r}: the model has {known}; null is all of them together")
            readouts = [
                replace(readout, heads={self.head: readout.heads[self.head]})
                for readout in readouts
                if self.head in readout.heads
            ]
        return [Reader(self.model, readout, self._special, self.tokens) for readout in readouts]

    @property
    def sizes(self) -> Sizes:
        """What a plan must know of the model."""
        return Sizes(len(self.blocks), self._heads, self._special, self._grid, self.reader.reads)

    def require(self, site: Site) -> None:
        """Raises ``VitPatchError`` for a site that the family does not have."""
        if site in self.missing:
            has = ", ".join(known for known in HOOKED if known not in self.missing)
            raise VitPatchError(f"target={site}: {self.family.name} has no such values; it has {has}")

    def caveat(self, site: Site) -> str | None:
        """A line on why each patch of a site is a full forward pass; ``None`` where it is not."""
        if self.runs_by_parts(site):
            return None
        return f"{self.family.name}: {NOT_BY_HEADS if self.stepwise else NOT_STEPWISE}"

    def runs_by_parts(self, site: Site) -> bool:
        """Whether patches of a site are computed block by block; else each is a full forward pass."""
        return self.stepwise and (self.by_heads or not site.by_head)

    @property
    def by_heads(self) -> bool:
        """Whether attention follows the formula of ``Block`` in all blocks, and so can be computed by head."""
        return all(block.by_heads for block in self.blocks)

    @by_heads.setter
    def by_heads(self, is_so: bool) -> None:
        for block in self.blocks:
            block.by_heads = is_so

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the attention scores."""
        return any(block.call.bias is not None for block in self.blocks)

    @cached_property
    def weights_digest(self) -> str:
        """Sixteen hex digits of all weights by name, type, shape and value."""
        return digest_of_weights(self.model)

    @property
    def checkpoint_digest(self) -> str:
        """The digest of the checkpoint's weights; in a zero-shot model those that are made from labels do not count."""
        return getattr(self.model, "checkpoint_digest", None) or self.weights_digest

    @property
    def config_digest(self) -> str:
        """Sixteen hex digits of what the config says of the architecture: heads, activation, epsilons and the like."""
        values = self.model.config.to_diff_dict()
        return digest({key: value for key, value in values.items() if key not in NOT_OF_THE_ARCHITECTURE})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.model.parameters()).dtype

    def crop_to_patches(self, masks: Tensor | None) -> Tensor | None:
        """The part of masks (batch, 1, height, width) that image patches cover, where they leave a margin."""
        if masks is None:
            return None
        rows, columns = (number * step for number, step in zip(self._grid, self._patch, strict=True))
        return masks[..., :rows, :columns]

    def normalize(self, images: Tensor) -> Tensor:
        """Images (batch, 3, height, width) in [0, 1] → normalised pixels, in the type of the weights."""
        return ((images - self.mean) / self.std).to(self.dtype)

    @property
    def patch_embedding(self) -> nn.Conv2d:
        """The convolution that makes patch embeddings of pixels. Raises ``VitPatchError`` unless it is just one."""
        if len(self._patch_convolutions) != 1:
            raise VitPatchError(
                f"corruption embedding_noise: {self.family.name} embeds its patches without a convolution of their "
                "size; use a corruption of pixels"
            )
        return self._patch_convolutions[0]

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(patches, width) of an image's patch embeddings. Raises ``VitPatchError`` as ``patch_embedding`` does."""
        return self._grid[0] * self._grid[1], self.patch_embedding.out_channels

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        """Normalised pixels → patch embeddings before positions are added, (batch, patches, width), row by row."""
        output = run_until(self.model, pixels, HookPoint(self.patch_embedding, is_input=False))
        if output is None:
            raise VitPatchError(f"{self._name}: the convolution that fits its patches is never run")
        return output.flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels (batch, 3, height, width) → logits (batch, classes).

        ``noise`` (batch, patches, width) is added to the patch embeddings, before positions are.
        """
        with self._adding(noise):
            return self._logits(pixels)

    @contextmanager
    def _adding(self, noise: Tensor | None) -> Iterator[None]:
        """Adds noise to the patch embeddings of forward passes made inside the block."""

        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            batch, width, rows, columns = output.shape
            assert noise.shape == (batch, rows * columns, width), f"noise {tuple(noise.shape)} on {tuple(output.shape)}"
            return output + noise.transpose(1, 2).reshape(output.shape).to(output.device, output.dtype)

        with ExitStack() as hooks:
            if noise is not None:
                hooks.enter_context(self.patch_embedding.register_forward_hook(add, prepend=True))
            yield

    def _logits(self, pixels: Tensor) -> Tensor:
        if self.head is None:
            return self.model(pixel_values=pixels).logits
        return run_until(self.model, pixels, HookPoint(self.model.get_submodule(self.head), is_input=False))

    # --- by parts ---

    def embed(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised pixels → the stream that enters the first block, (batch, tokens, width); ``noise`` as above."""
        if self._recorded_on != self.device:
            self._record_calls()
        with self._adding(noise):
            stream = run_until(self.model, pixels, self.blocks[0].hook_point(Site.RESID_PRE))
        if stream is None:
            raise VitPatchError(f"{self._name}: its first block is never run")
        return stream

    @torch.no_grad()
    def _record_calls(self) -> None:
        """Runs a blank image to learn which tokens there are, and what attention is called with besides the stream."""
        calls: dict[Any, tuple[tuple, dict[str, Any], Any]] = {}

        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, key: Any) -> None:
            calls[key] = (args, kwargs, output.clone() if isinstance(output, Tensor) else output)  # a bias is changed

        modules = dict(self.model.named_modules(remove_duplicate=False))
        watched: dict[Any, nn.Module | None] = {"stream": self.blocks[0].module}
        watched["shared bias"] = modules.get(self.family.shared_bias)
        for number, block in enumerate(self.blocks):
            watched["attention", number] = block.hook_point(Site.ATTN_OUT).module
            watched["bias", number] = modules.get(f"{self.family.blocks}.{number}.{self.family.bias}")
        with ExitStack() as hooks:
            for key, module in watched.items():
                if module is not None:
                    hooks.enter_context(module.register_forward_hook(partial(record, key=key), with_kwargs=True))
            try:
                self.model(pixel_values=torch.zeros(1, 3, *self.input_size, device=self.device, dtype=self.dtype))
            except (RuntimeError, ValueError, TypeError) as error:
                reason = one_line(error, 160)
                raise VitPatchError(f"{self._name}: cannot be run on {self.input_size} pixels ({reason})") from error
        if not {"stream", *(("attention", number) for number in range(len(self.blocks)))} <= set(calls):
            raise VitPatchError(f"{self._name}: its blocks or their attention are never run")
        self.tokens, self.width = first_argument(*calls["stream"][:2]).shape[1:]
        self._special = self._names_of_special()
        self._recorded_on = self.device
        for number, block in enumerate(self.blocks):
            args, kwargs, _ = calls["attention", number]
            biases = [calls[key][2] for key in (("bias", number), "shared bias") if key in calls]
            bias = sum(b.reshape(-1, *b.shape[-3:]) for b in biases) if biases else None
            rotary = kwargs.get(self.family.rotary) if self.family.rotary else None
            block.call = CallArguments(args, kwargs, bias, rotary)

    def _names_of_special(self) -> tuple[str, ...]:
        """The tokens before the patches: as many of the row's names as there are, then the registers."""
        patches = self._grid[0] * self._grid[1]
        registers = int(config_value(self.model, self.family.registers or "") or 0)
        named = self.tokens - patches - registers
        if not 0 <= named <= len(self.family.special):
            raise VitPatchError(
                f"{self._name}: {self.tokens} tokens are not {patches} patches, {registers} registers and "
                f"{', '.join(self.family.special) or 'nothing'} before them"
            )
        return (*self.family.special[:named], *(f"register{i}" for i in range(registers)))

    # --- whole, with hooks ---

    @contextmanager
    def hooked(self, acts: Mapping[Place, Act]) -> Iterator[None]:
        """Inside the block each act gets the value at its place (batch, tokens, channels) and may return a new one.

        ``resid_mid`` can be read here, not replaced: what is replaced in front of the MLP's norm is not the stream.
        """
        with ExitStack() as hooks:
            for (site, layer), act in acts.items():
                hooks.enter_context(attached(act, self.blocks[layer].hook_point(site)))
            yield

    @contextmanager
    def reading(self, places: tuple[Place, ...]) -> Iterator[dict[Place, Tensor]]:
        """Collects the value of each place in the forward passes made inside the block."""
        values: dict[Place, Tensor] = {}

        def keep(place: Place) -> Act:
            return lambda value: values.__setitem__(place, value.detach())

        with self.hooked({place: keep(place) for place in places}):
            yield values

    def replacing(self, values: Mapping[Place, Tensor]) -> AbstractContextManager[None]:
        """Inside the block whole ``values`` stand at their places."""
        return self.hooked({place: lambda value, new=new: new for place, new in values.items()})

    @torch.no_grad()
    def first_bad_layer(self, pixels: Tensor) -> int | None:
        """The first layer after which a value of this run is not finite, or ``None``."""
        places = tuple((Site.RESID_POST, layer) for layer in range(self.sizes.depth))
        with self.reading(places) as values:
            self(pixels)
        return next((layer for (_, layer), value in values.items() if not value.isfinite().all()), None)


def digest_of_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Sixteen hex digits of all weights by name, type, shape and value; ``without`` those of some names."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in without:
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]
