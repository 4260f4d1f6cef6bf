"""CLIP and SigLIP without a classifier: an image's classes are the data's labels, by its similarity to their texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitpatch.checks import Expected
from vitpatch.data.labels import are_numbers, fold_name, readable_name
from vitpatch.errors import VitPatchError
from vitpatch.formatting import digest, first_few
from vitpatch.models.checkpoint import DTYPES, IMAGE_TEXT_TYPES, Checkpoint
from vitpatch.models.classes import set_labels
from vitpatch.models.families import Family
from vitpatch.models.vit import digest_of_weights

SIGMOID_NOTE = (
    "SigLIP is trained to answer each text by itself, with a sigmoid; prob, log_odds and kl here are of the softmax "
    "over the data's labels; metric=logit takes the label's own logit alone"
)
SAME_TEXT = (
    "the model cannot tell apart {}, whose texts are the same to it: each has its share of one probability; "
    "other names in the data tell them apart"
)


class Similarity(nn.Module):
    """An image's embedding → its similarity to each text: scale × cosine + bias.

    ``texts`` (classes, width), of length 1 each; ``projection`` takes the pooled image there, where the model has one.
    """

    def __init__(self, texts: Tensor, scale: Tensor, bias: Tensor, projection: nn.Module | None) -> None:
        super().__init__()
        self.projection = projection
        for name, value in (("texts", texts), ("scale", scale), ("bias", bias)):
            self.register_buffer(name, value.detach().clone())

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled images (rows, width) → logits (rows, classes)."""
        embedding = pooled if self.projection is None else self.projection(pooled)
        return self.scale * F.normalize(embedding, dim=-1) @ self.texts.T + self.bias


class ZeroShot(nn.Module):
    """The vision tower of CLIP or SigLIP as an image classifier, its classes those of ``texts`` (classes, width).

    ``notes`` are on its answers. The other weights of ``model``, which made the texts, are not kept.
    """

    def __init__(self, model: Any, texts: Tensor, names: Sequence[str], notes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.notes = notes
        of_vision = {name for name in model.state_dict() if name.startswith("vision_model.")}
        self.text_digest = digest_of_weights(model, without=of_vision)
        self.vision_model = model.vision_model
        bias = getattr(model, "logit_bias", torch.zeros(()))
        self.similarity = Similarity(texts, model.logit_scale.exp(), bias, getattr(model, "visual_projection", None))
        self.config = model.config
        set_labels(self.config, names)

    @property
    def checkpoint_digest(self) -> str:
        """Sixteen hex digits of the checkpoint's weights, whatever the labels of the data are."""
        return digest([digest_of_weights(self, without={"similarity.texts"}), self.text_digest])

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Pixels (batch, 3, height, width) → ``logits`` (batch, classes)."""
        return ImageClassifierOutput(logits=self.similarity(self.vision_model(pixel_values).pooler_output))


@dataclass(frozen=True)
class ZeroShotCheckpoint(Checkpoint):
    """A model of images and texts (CLIP, SigLIP) as a classifier of the data's labels.

    ``prompts`` are templates, ``{}`` standing for a label's name; a class is the mean of its texts' directions.
    """

    needs_names: ClassVar[bool] = True

    prompts: Annotated[str | tuple[str, ...], Expected("templates such as 'a photo of a {}.'")] = ("a photo of a {}.",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.prompts, str):
            object.__setattr__(self, "prompts", (self.prompts,))
        if not all(prompt.count("{}") == 1 for prompt in self.prompts):
            raise VitPatchError(f"model.prompts {list(self.prompts)}: expected templates such as 'a photo of a {{}}.'")

    def _classifier(self, config: Any, family: Family, names: tuple[str, ...] | None) -> ZeroShot:
        if names is None:
            raise VitPatchError("this model takes its classes from the data's label names; the data have none")
        if are_numbers(names):
            raise VitPatchError(
                f"this model reads the data's label names, and they are numbers ({', '.join(names[:3])}); give it words"
            )
        if config.model_type not in IMAGE_TEXT_TYPES:
            raise VitPatchError(
                f"model {self.path}: model_type {config.model_type!r} has no texts; CLIP and SigLIP have"
            )
        if self.head_path or self.readout:
            raise VitPatchError("model.head_path and model.readout: a zero-shot model has one head, its texts")
        model = self.model(config, "AutoModel")
        texts = self._embed_texts(model, names)
        notes = (SIGMOID_NOTE,) * config.model_type.startswith("siglip") + _same_text_notes(names, texts)
        return ZeroShot(model, texts, names, notes)

    @torch.no_grad()
    def _embed_texts(self, model: Any, names: tuple[str, ...]) -> Tensor:
        """The mean direction of each class's texts, (classes, width), of length 1.

        Raises ``VitPatchError`` where the tokenizer reads two labels as the same text.
        """
        tokenizer = self.tokenizer()
        model.eval()
        is_padded = model.config.model_type.startswith("siglip")  # as it was trained, and without a mask
        longest = model.config.text_config.max_position_embeddings
        options = {"padding": "max_length" if is_padded else True, "max_length": longest, "truncation": True}
        directions: list[Tensor] = []
        name_of_tokens: dict[tuple[int, ...], str] = {}
        for name in names:
            words = readable_name(name)
            texts = [template.replace("{}", words) for template in self.prompts]
            tokens = tokenizer(texts, return_tensors="pt", **options)
            other = name_of_tokens.setdefault(tuple(tokens["input_ids"].flatten().tolist()), name)
            if fold_name(readable_name(other)) != fold_name(words):  # ImageNet has a Cardigan, the dog, and a cardigan
                raise VitPatchError(
                    f"model {self.path}: its tokenizer reads the labels {other!r} and {name!r} as the same text; are "
                    "its files (tokenizer.json, or vocab.json and merges.txt) there?"
                )
            keys = ("input_ids",) if is_padded else ("input_ids", "attention_mask")
            features = model.get_text_features(**{key: tokens[key] for key in keys if key in tokens})
            features = features if isinstance(features, Tensor) else features.pooler_output
            directions.append(F.normalize(F.normalize(features.float(), dim=-1).mean(0), dim=-1))
        return torch.stack(directions).to(DTYPES[self.dtype])


def _same_text_notes(names: Sequence[str], texts: Tensor) -> tuple[str, ...]:
    """A line on the labels that have the same direction; ``texts`` (classes, width)."""
    groups: dict[bytes, list[str]] = {}
    for name, direction in zip(names, texts, strict=True):
        groups.setdefault(direction.float().numpy().tobytes(), []).append(name)
    several = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return (SAME_TEXT.format(first_few(several, between="; ")),) if several else ()
