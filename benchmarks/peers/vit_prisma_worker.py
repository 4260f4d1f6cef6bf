"""vit-prisma: run_with_cache of the clean images, run_with_hooks with a patch at blocks.N.hook_attn_out.

HookedViT is its own implementation of ViT (einsum, no sdpa to choose). Its loader takes models of timm, CLIP and
ViViT from the hub but no ViT of transformers, so the model's weights are renamed to timm's names here and go through
the library's converter for timm, into a HookedViT of the same shape.
"""

import importlib.machinery
import sys
import types

import torch

# timm needs torchvision, whose wheels import only beside the build of torch that they were made for. Nothing of
# either is called here, so where torchvision does not import both are hidden from transformers and vit_prisma.
try:
    import torchvision  # noqa: F401
except Exception:  # the failed import is an ImportError or, from inside torch, a RuntimeError
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    sys.modules["timm"] = types.ModuleType("timm")
    sys.modules["timm"].__spec__ = importlib.machinery.ModuleSpec("timm", None)

from common import Effects, Task, serve
from vit_prisma.configs.HookedViTConfig import HookedViTConfig
from vit_prisma.models.base_vit import HookedViT
from vit_prisma.prisma_tools.loading_from_pretrained import convert_timm_weights


def from_pretrained(task: Task) -> Effects:
    """The loader of the library, given the model of transformers."""
    model = HookedViT.from_pretrained(str(task.model_folder), is_timm=False, hf_model=task.model())
    return _patching(model.eval(), task)


def processed(task: Task) -> Effects:
    """Converted weights, folded and centred as from_pretrained does by default."""
    return _patching(_converted(task), task)


def unprocessed(task: Task) -> Effects:
    """Converted weights as they are."""
    as_is = {"fold_ln": False, "center_writing_weights": False, "fold_value_biases": False}
    return _patching(_converted(task, **as_is), task)


def _converted(task: Task, **processing: bool) -> HookedViT:
    model = task.model()
    config = model.config
    hooked = HookedViT(
        HookedViTConfig(
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_head=config.hidden_size // config.num_attention_heads,
            d_mlp=config.intermediate_size,
            n_heads=config.num_attention_heads,
            activation_name=config.hidden_act,
            eps=config.layer_norm_eps,
            patch_size=config.patch_size,
            image_size=config.image_size,
            n_classes=config.num_labels,
            return_type="class_logits",
        )
    )
    hooked.load_and_process_state_dict(convert_timm_weights(_timm_names(model), hooked.cfg), **processing)
    return hooked.eval()


def _timm_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    embeddings = model.vit.embeddings
    modules = {"patch_embed.proj": embeddings.patch_embeddings.projection, "norm": model.vit.layernorm}
    modules["head"] = model.classifier
    state = {"cls_token": embeddings.cls_token, "pos_embed": embeddings.position_embeddings}
    for index, block in enumerate(model.vit.layers):
        name, attention = f"blocks.{index}", block.attention
        modules |= {f"{name}.norm1": block.layernorm_before, f"{name}.norm2": block.layernorm_after}
        modules |= {f"{name}.mlp.fc1": block.mlp.fc1, f"{name}.mlp.fc2": block.mlp.fc2}
        modules[f"{name}.attn.proj"] = attention.o_proj
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        state[f"{name}.attn.qkv.weight"] = torch.cat([part.weight for part in heads])
        state[f"{name}.attn.qkv.bias"] = torch.cat([part.bias for part in heads])
    for name, module in modules.items():
        state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: value.detach() for name, value in state.items()}


def _patching(model: HookedViT, task: Task) -> Effects:
    names = [f"blocks.{layer}.hook_attn_out" for layer in range(model.cfg.n_layers)]

    def effects() -> torch.Tensor:
        with torch.inference_mode():
            _, cache = model.run_with_cache(task.clean, names_filter=names, return_cache_object=False)
            before = task.probability(model(task.corrupt))
            rows = []
            for name in names:
                hook = (name, lambda _value, hook: cache[hook.name])
                rows.append(task.probability(model.run_with_hooks(task.corrupt, fwd_hooks=[hook])) - before)
            return torch.stack(rows)

    return effects


if __name__ == "__main__":
    serve(
        ["vit-prisma"],
        {
            "from_pretrained": from_pretrained,
            "convert_timm_weights, processed": processed,
            "convert_timm_weights": unprocessed,
        },
    )
