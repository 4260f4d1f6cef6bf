"""Every patch by walking the model's modules by hand: no hook, no code of the project's executor.

Values by head are (batch, tokens, heads, head width), the pattern (batch, query tokens, heads, key tokens).
"""

import torch

PARTS = {"vit": ("vit", 1), "deit": ("deit", 2)}  # name of the backbone, tokens before the patches
BY_HEAD = ("z", "q", "k", "v", "pattern")


def layers_of(centre: int, window: int, depth: int) -> list[int]:
    if window == -1:
        return list(range(centre + 1))
    if window == -2:
        return list(range(centre, depth))
    half = window // 2
    return [layer for layer in range(centre - half, centre - half + window) if 0 <= layer < depth]


def attend(block, normed, site):
    """Attention by its formula: softmax(q kᵀ · scale) v, heads side by side, then the output projection."""
    part = block.attention

    def by_head(name, projection):
        return site(name, projection(normed).unflatten(-1, (part.num_attention_heads, -1)))

    q, k, v = by_head("q", part.q_proj), by_head("k", part.k_proj), by_head("v", part.v_proj)
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * q.shape[-1] ** -0.5
    pattern = site("pattern", scores.softmax(-1))
    z = site("z", torch.einsum("bqhk,bkhd->bqhd", pattern, v))
    return part.o_proj(z.flatten(2))


@torch.no_grad()
def walk(model, family, pixels, put=None, seen=None):
    """Logits of one forward pass; ``put`` maps (site, layer) to act(value) → value, ``seen`` collects the values."""
    put, seen = put or {}, {} if seen is None else seen

    def at(layer):
        def site(name, value):
            seen[name, layer] = value
            return put[name, layer](value) if (name, layer) in put else value

        return site

    backbone = getattr(model, PARTS[family][0])
    state = backbone.embeddings(pixels)
    for layer, block in enumerate(backbone.layers):
        site = at(layer)
        state = site("resid_pre", state)
        state = state + site("attn_out", attend(block, block.layernorm_before(state), site))
        state = site("resid_mid", state)
        state = state + site("mlp_out", block.mlp(block.layernorm_after(state)))
        state = site("resid_post", state)
    return read(model, backbone.layernorm(state))


def read(model, state):
    if hasattr(model, "cls_classifier"):
        return (model.cls_classifier(state[:, 0]) + model.distillation_classifier(state[:, 1])) / 2
    return model.classifier(state[:, 0])


def at_tokens(family: str, tokens: str) -> tuple:
    """Where a token group is in values of (batch, tokens, …)."""
    special = PARTS[family][1]
    return slice(None), {"all": slice(None), "cls": slice(0, 1), "patches": slice(special, None)}[tokens]


def run_patches(model, family, clean, corrupt, patches, *, site="attn_out", direction="denoise"):
    """Logits of (clean, corrupt, patched), float64; patched is (patches, images, classes), all of one pass.

    A patch is (layers, place, head): where the donor's values stand in, an index of (images, tokens) such as
    ``at_tokens`` gives or ``(mask,)``, and of one head or, ``None``, of all.
    """
    donor, recipient = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    values = {}
    of_donor, of_recipient = walk(model, family, donor, seen=values), walk(model, family, recipient)

    def taken(layer):
        """The donor's values in the runs that replace the layer; a run's images lie one after another."""

        def act(value):
            new, theirs = value.clone().unflatten(0, (len(patches), len(clean))), values[site, layer]
            for run, (layers, place, head) in zip(new, patches, strict=True):
                if layer in layers:
                    at = place if head is None else (*place, head)
                    run[at] = theirs[at]
            return new.flatten(0, 1)

        return act

    puts = {(site, layer): taken(layer) for layer in {layer for layers, *_ in patches for layer in layers}}
    patched = walk(model, family, recipient.repeat(len(patches), 1, 1, 1), put=puts)
    base = (of_donor, of_recipient) if direction == "denoise" else (of_recipient, of_donor)
    return *(logits.double() for logits in base), patched.double().unflatten(0, (len(patches), len(clean)))


def expected(model, family, clean, corrupt, *, site="attn_out", window=3, direction="denoise", tokens="all"):
    """The same of a window around each layer in turn: patched is (layers, images, classes)."""
    depth, place = len(getattr(model, PARTS[family][0]).layers), at_tokens(family, tokens)
    patches = [(layers_of(centre, window, depth), place, None) for centre in range(depth)]
    return run_patches(model, family, clean, corrupt, patches, site=site, direction=direction)
