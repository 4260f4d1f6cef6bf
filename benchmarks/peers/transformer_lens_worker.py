"""TransformerLens: run_with_cache of the clean images, run_with_hooks with a patch at blocks.N.attn.hook_out.

TransformerBridge.boot_transformers loads ViT and always sets eager attention, so that its hooks see the attention
patterns. This task needs none, so the first case sets sdpa again on the model inside the bridge, like the other side.
"""

import torch
from common import Effects, Task, serve
from transformer_lens.model_bridge import TransformerBridge


def sdpa(task: Task) -> Effects:
    """The bridge with sdpa attention set on its model after loading."""
    bridge = _boot(task)
    bridge.original_model.set_attn_implementation("sdpa")
    return _patching(bridge, task)


def eager(task: Task) -> Effects:
    """The bridge as it comes: eager attention."""
    return _patching(_boot(task), task)


def _boot(task: Task) -> TransformerBridge:
    bridge = TransformerBridge.boot_transformers(str(task.model_folder), device="cpu", dtype=torch.float32)
    return bridge.eval()


def _patching(bridge: TransformerBridge, task: Task) -> Effects:
    names = [f"blocks.{layer}.attn.hook_out" for layer in range(bridge.cfg.n_layers)]

    def effects() -> torch.Tensor:
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(task.clean, names_filter=names)
            before = task.probability(bridge(task.corrupt))
            rows = []
            for name in names:
                hook = (name, lambda _value, hook: cache[hook.name])
                rows.append(task.probability(bridge.run_with_hooks(task.corrupt, fwd_hooks=[hook])) - before)
            return torch.stack(rows)

    return effects


if __name__ == "__main__":
    serve(["transformer-lens"], {"sdpa": sdpa, "eager": eager})
