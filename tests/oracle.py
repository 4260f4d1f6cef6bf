"""Every patch by walking the model's modules by hand: no hook, no code of the project's executor."""

import torch

PARTS = {"vit": ("vit", 1), "deit": ("deit", 2)}  # name of the backbone, tokens before the patches


def layers_of(centre: int, window: int, depth: int) -> list[int]:
    half = window // 2
    return [layer for layer in range(centre - half, centre - half + window) if 0 <= layer < depth]


@torch.no_grad()
def walk(model, family, pixels, put=None, seen=None):
    """Logits of one forward pass; ``put`` maps (site, layer) to act(value) → value, ``seen`` collects the values."""
    put, seen = put or {}, {} if seen is None else seen

    def site(name, layer, value):
        seen[name, layer] = value
        return put[name, layer](value) if (name, layer) in put else value

    backbone = getattr(model, PARTS[family][0])
    state = backbone.embeddings(pixels)
    for layer, block in enumerate(backbone.layers):
        state = state + site("attn_out", layer, block.attention(block.layernorm_before(state))[0])
        state = state + site("mlp_out", layer, block.mlp(block.layernorm_after(state)))
        state = site("resid_post", layer, state)
    state = backbone.layernorm(state)
    if hasattr(model, "cls_classifier"):
        return (model.cls_classifier(state[:, 0]) + model.distillation_classifier(state[:, 1])) / 2
    return model.classifier(state[:, 0])


def expected(model, family, clean, corrupt, *, site="attn_out", window=3, direction="denoise", tokens="all"):
    """Logits of (clean, corrupt, [one a layer]), each (batch, classes) float64."""
    depth = len(getattr(model, PARTS[family][0]).layers)
    donor, recipient = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    values = {}
    walk(model, family, donor, seen=values)
    first, last = {"all": (0, None), "cls": (0, 1), "patches": (PARTS[family][1], None)}[tokens]

    def taken(layer):
        def act(value):
            new = value.clone()
            new[:, first:last] = values[site, layer][:, first:last]
            return new

        return act

    patched = [
        walk(model, family, recipient, put={(site, layer): taken(layer) for layer in layers_of(c, window, depth)})
        for c in range(depth)
    ]
    base = [walk(model, family, pixels) for pixels in (clean, corrupt)]
    return *(b.double() for b in base), [p.double() for p in patched]
