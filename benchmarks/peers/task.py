"""The task of the peers' benchmark as files, and the effects that every worker has to find.

denoise at the output of every attention module, all tokens, one layer at a time: the effect of a layer on an image is
the probability of the label with the clean run's attention output in the corrupted run, minus without it.
"""

from pathlib import Path

import torch
from common import Task
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}


def make_task(folder: Path, size: int, images: int, small: bool = False) -> Task:
    """Write a random ViT-B/16 (or a small ViT), random images and labels into the folder."""
    torch.manual_seed(0)
    shape = {**SMALL, "image_size": 32, "patch_size": 8} if small else {"image_size": size}
    config = ViTConfig(num_labels=10, initializer_range=0.02, **shape)
    model = ViTForImageClassification(config)
    # As transformers draws it (std 0.02) every probability stays near 1 / 10; with far more, softmax saturates.
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    model.save_pretrained(folder / "model")
    clean = torch.randn(images, 3, config.image_size, config.image_size)
    corrupt = clean.mean(1, keepdim=True).repeat(1, 3, 1, 1)
    with torch.no_grad():  # the predicted labels: a random one can have a probability near zero
        labels = model.eval()(clean).logits.argmax(-1)
    tensors = {"clean": clean, "corrupt": corrupt, "labels": labels}
    save_file(tensors, folder / "images.safetensors")
    return Task(folder / "model", **tensors)


@torch.inference_mode()
def reference(task: Task) -> torch.Tensor:
    """The effects (layers, images) by a full forward pass of the model for every layer, with one hook."""
    model = task.model()
    modules = [block.attention for block in model.vit.layers]
    kept: dict[int, torch.Tensor] = {}

    def keep(module: torch.nn.Module, _args: tuple, output: tuple) -> None:
        kept[id(module)] = output[0]

    def put(module: torch.nn.Module, _args: tuple, output: tuple) -> tuple:
        return (kept[id(module)], *output[1:])

    handles = [module.register_forward_hook(keep) for module in modules]
    model(task.clean)
    for handle in handles:
        handle.remove()
    before = task.probability(model(task.corrupt).logits)
    rows = []
    for module in modules:
        handle = module.register_forward_hook(put)
        rows.append(task.probability(model(task.corrupt).logits) - before)
        handle.remove()
    return torch.stack(rows)
