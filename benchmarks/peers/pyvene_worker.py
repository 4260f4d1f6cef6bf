"""pyvene: collect every attention output of the clean images, then one vanilla intervention per layer.

ViT is not among pyvene's model types. A part of any model can be named by its path, but where the intervention is
given by its class the width of the part is looked up by model type all the same. An intervention object needs none.
"""

from collections.abc import Callable

import pyvene
import torch
from common import Effects, Task, serve

Part = Callable[[int, type], dict]  # the configuration of one intervention, from its layer and class


def classes(task: Task) -> Effects:
    """The attention module by its path, the intervention by its class."""
    return _interventions(task, lambda layer, kind: {"component": _path(layer), "intervention_type": kind})


def objects(task: Task) -> Effects:
    """The attention module by its path, the intervention as an object."""
    return _interventions(task, lambda layer, kind: {"component": _path(layer), "intervention": kind()})


def _path(layer: int) -> str:
    return f"vit.layers[{layer}].attention.output"


def _interventions(task: Task, part: Part) -> Effects:
    model = task.model()
    layers = range(model.config.num_hidden_layers)
    collector = pyvene.IntervenableModel([part(layer, pyvene.CollectIntervention) for layer in layers], model=model)
    patchers = [pyvene.IntervenableModel(part(layer, pyvene.VanillaIntervention), model=model) for layer in layers]

    def effects() -> torch.Tensor:
        with torch.inference_mode():
            clean = collector({"pixel_values": task.clean})[0][1]
            before = task.probability(model(task.corrupt).logits)
            rows = []
            for patcher, value in zip(patchers, clean, strict=True):
                _, output = patcher({"pixel_values": task.corrupt}, source_representations=value)
                rows.append(task.probability(output.logits) - before)
            return torch.stack(rows)

    return effects


if __name__ == "__main__":
    serve(["pyvene"], {"intervention class": classes, "intervention object": objects})
