"""A backbone and a linear head from a file, as an image classifier (DINOv3, which Hugging Face has no class for)."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vitpatch.errors import VitPatchError
from vitpatch.formatting import one_line
from vitpatch.models.classes import Classes, set_labels

log = logging.getLogger(__name__)


class BackboneClassifier(nn.Module):
    """A backbone and a linear head on its CLS token, or on it and the mean of its patches where it is twice as wide.

    Its classes have the names of the backbone's config where these are as many as the head's outputs; else they have
    none, and a warning that names the model's ``path`` says why.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear, path: str) -> None:
        super().__init__()
        self.backbone, self.classifier, self.config = backbone, head, backbone.config
        own = Classes.of(self.config)
        names, doubt = own.names, own.doubt
        if names is not None and len(names) != head.out_features:
            doubt = f"its config names {len(names)} classes, model.head_path has {head.out_features}"
        if doubt is not None:
            log.warning("model %s: the classes of model.head_path have no names: %s", path, doubt)
        if doubt is not None or names is None:
            names = [f"LABEL_{index}" for index in range(head.out_features)]
        set_labels(self.config, names)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Pixels (batch, 3, height, width) → ``logits`` (batch, classes)."""
        tokens = self.backbone(pixel_values=pixel_values).last_hidden_state
        read = tokens[:, 0]
        if self.classifier.in_features == 2 * tokens.shape[-1]:
            patches = tokens[:, 1 + getattr(self.config, "num_register_tokens", 0) :]
            read = torch.cat([read, patches.mean(1)], -1)
        return ImageClassifierOutput(logits=self.classifier(read))


def load_head(path: str, width: int, random_init: bool) -> nn.Linear:
    """The linear head of a safetensors file for a backbone of this ``width``; ``random_init``: only its shape."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path).expanduser()
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        reason = one_line(error, 120)
        raise VitPatchError(f"model.head_path {file}: not a readable safetensors file ({reason})") from error
    weight, bias = weights.get("weight"), weights.get("bias")
    fits = weight is not None and weight.dim() == 2 and weight.shape[1] in (width, 2 * width)
    if not fits or set(weights) - {"weight", "bias"} or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        raise VitPatchError(
            f"model.head_path {file}: has {shapes}; expected weight (classes, {width}) of CLS, or "
            f"(classes, {2 * width}) of CLS and the mean patch, and bias (classes,)"
        )
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    if not random_init:
        head.load_state_dict(weights)
    return head
