"""captum's LayerFeatureAblation: the whole output of a layer is one feature whose baseline is the clean run's.

Its attribution is the output before minus the output after the ablation: the effect with the other sign. A layer's
output has to be a tensor or tensors; with sdpa the attention module of transformers' ViT returns a tensor and None,
its o_proj a tensor. For one number it runs the model three times: for the layer's output, without and with ablation.
"""

from collections.abc import Callable

import torch
from captum.attr import LayerActivation, LayerFeatureAblation
from common import Effects, Task, serve


def attention_module(task: Task) -> Effects:
    """Ablate the output of the attention module itself."""
    return _ablation(task, lambda block: block.attention)


def output_projection(task: Task) -> Effects:
    """Ablate the output of o_proj, the last step of the attention module: the same tensor."""
    return _ablation(task, lambda block: block.attention.o_proj)


def _ablation(task: Task, choose: Callable[[torch.nn.Module], torch.nn.Module]) -> Effects:
    model = task.model()
    layers = [choose(block) for block in model.vit.layers]

    def probabilities(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels).logits.softmax(-1)

    def effects() -> torch.Tensor:
        with torch.inference_mode():
            clean = LayerActivation(probabilities, layers).attribute(task.clean)
            rows = []
            for layer, baseline in zip(layers, clean, strict=True):
                attribution = LayerFeatureAblation(probabilities, layer).attribute(
                    task.corrupt,
                    layer_baselines=baseline,
                    target=task.labels,
                    layer_mask=torch.zeros((1, *baseline.shape[1:]), dtype=torch.long),  # one group: all of it
                )
                rows.append(-attribution[:, 0, 0])  # every element of the group carries the same number
            return torch.stack(rows)

    return effects


if __name__ == "__main__":
    serve(["captum"], {"attention module": attention_module, "o_proj of the attention": output_projection})
