"""vitpatch's side of the comparison: one call of patch on the loaded model."""

import torch
from common import Effects, Task, serve

import vitpatch


def patch(task: Task) -> Effects:
    """The table of patch() as effects (layers, images)."""
    model = task.model()

    def effects() -> torch.Tensor:
        table = vitpatch.patch(
            model, task.clean, task.corrupt, task.labels, target="attn_out", window=1, direction="denoise"
        )
        wide = table.pivot(index="layer", columns="example_id", values="effect")
        return torch.from_numpy(wide[table["example_id"].unique()].to_numpy())

    return effects


if __name__ == "__main__":
    serve(["vitpatch"], {"patch": patch})
