"""nnsight: one trace of the clean images keeps every attention output, one trace per layer assigns it.

The model is wrapped by NNsight, as its documentation does for any torch module, and the kept value is assigned to
the output of the module inside the trace.
"""

import nnsight
import torch
from common import Effects, Task, serve
from nnsight import NNsight


def assign_output(task: Task) -> Effects:
    """Assign the pair that the attention module returns, its first tensor from the clean run."""
    model = NNsight(task.model())
    blocks = model.vit.layers

    def effects() -> torch.Tensor:
        with torch.inference_mode():
            with model.trace(task.clean):
                clean = nnsight.save([])
                for block in blocks:
                    clean.append(block.attention.output[0])
            with model.trace(task.corrupt):
                logits = model.output.logits.save()
            before = task.probability(logits)
            rows = []
            for block, value in zip(blocks, clean, strict=True):
                with model.trace(task.corrupt):
                    block.attention.output = (value, *block.attention.output[1:])
                    logits = model.output.logits.save()
                rows.append(task.probability(logits) - before)
            return torch.stack(rows)

    return effects


if __name__ == "__main__":
    serve(["nnsight"], {"attention module": assign_output})
