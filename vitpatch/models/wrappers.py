"""Image classifiers that Hugging Face has no class for: a backbone with a head, likeness to texts, square images.

Each keeps the modules it is made of as they are, and answers as an image classifier does: ``(pixel_values) → .logits``.
Also the digests that name a model by its weights and config, of which wrappers have parts that are no checkpoint's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitpatch.identity import digest
from vitpatch.models.preprocessing import cut_into_patches

NOT_OF_THE_ARCHITECTURE = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
    "id2label", "label2id", "label_names",
)  # fmt: skip
"""Keys of a config that change no number of a run."""


class BackboneClassifier(nn.Module):
    """A backbone and a linear head on its CLS token, or on it and the mean of its patches where it is twice as wide."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, names: Sequence[str] | None) -> None:
        super().__init__()
        self.backbone, self.classifier = backbone, head
        self.config = with_labels(backbone.config, names, head.out_features)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Pixels (batch, 3, height, width) → ``logits`` (batch, classes)."""
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state
        read = tokens[:, 0]
        if self.classifier.in_features == 2 * tokens.shape[-1]:
            patches = tokens[:, 1 + getattr(self.config, "num_register_tokens", 0) :]
            read = torch.cat([read, patches.mean(1)], -1)
        return ImageClassifierOutput(logits=self.classifier(read))


class Similarity(nn.Module):
    """An image's embedding → its likeness to each text: scale × cosine + bias.

    ``texts`` (classes, width), of length 1 each; ``projection`` takes the pooled image there, where the model has one.
    """

    def __init__(self, texts: Tensor, scale: Tensor, bias: Tensor, projection: nn.Module | None) -> None:
        super().__init__()
        self.projection = projection
        for name, value in (("texts", texts), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled images (rows, width) → logits (rows, classes)."""
        embedded = pooled if self.projection is None else self.projection(pooled)
        return self.scale * F.normalize(embedded, dim=-1) @ self.texts.T + self.bias


class ZeroShot(nn.Module):
    """The vision side of CLIP or SigLIP, its classes those of ``texts`` (classes, width).

    ``notes`` on its answers; ``text_digest``: of all weights but the vision tower's, which made the texts and are
    not kept.
    """

    made_of_labels = ("similarity.texts",)
    """Names of weights that are not the checkpoint's, but made from the labels of the data."""

    def __init__(self, model: Any, texts: Tensor, names: Sequence[str], notes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.notes = notes
        of_vision = [name for name in model.state_dict() if name.startswith("vision_model.")]
        self.text_digest = digest_of_weights(model, without=frozenset(of_vision))
        self.vision_model = model.vision_model
        bias = getattr(model, "logit_bias", torch.zeros(()))
        self.similarity = Similarity(texts, model.logit_scale.exp(), bias, getattr(model, "visual_projection", None))
        self.config = with_labels(model.config, names, len(names))

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Pixels (batch, 3, height, width) → ``logits`` (batch, classes)."""
        return ImageClassifierOutput(logits=self.similarity(self.vision_model(pixel_values).pooler_output))


def take_square_images(tower: nn.Module) -> None:
    """Lets a vision tower that takes images of any shape as rows of patches (NaFlex) be given pixels, in a hook."""

    def to_patches(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        pixels = args[0] if args else kwargs["pixel_values"]
        if pixels.dim() != 4:
            return None
        patch = tower.config.patch_size
        rows, columns = (edge // patch for edge in pixels.shape[2:])
        shapes = torch.tensor([[rows, columns]], device=pixels.device).expand(len(pixels), -1)
        everywhere = torch.ones(len(pixels), rows * columns, dtype=torch.int64, device=pixels.device)
        shapes_and_mask = {"pixel_attention_mask": everywhere, "spatial_shapes": shapes}
        return (), kwargs | shapes_and_mask | {"pixel_values": cut_into_patches(pixels, patch)}

    tower.register_forward_pre_hook(to_patches, with_kwargs=True)


def with_labels(config: Any, names: Sequence[str] | None, classes: int) -> Any:
    """A copy of a config with these labels, by number where they have no names."""
    config = copy.deepcopy(config)
    config.id2label = dict(enumerate(names or [f"LABEL_{i}" for i in range(classes)]))
    config.label2id = {name: index for index, name in config.id2label.items()}
    return config


def digest_of_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Sixteen hex digits of all weights by name, type, shape and value; ``without`` those of some names."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in without:
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def digest_of_checkpoint(model: nn.Module) -> str:
    """Sixteen hex digits of what a model has of its files, whatever the labels of the data are.

    ``digest_of_weights``, but for a model some of whose weights are ``made_of_labels``: without these, and with those
    that made them.
    """
    if (made := getattr(model, "made_of_labels", None)) is None:
        return digest_of_weights(model)
    return digest([digest_of_weights(model, without=made), model.text_digest])


def digest_of_config(config: Any) -> str:
    """Sixteen hex digits of what a config says of the architecture."""
    return digest({key: value for key, value in config.to_diff_dict().items() if key not in NOT_OF_THE_ARCHITECTURE})
