"""A tiny random model of every family, and every patch by plain torch hooks on the modules that a table names.

Shares no code with the project: the modules' names are written down here a second time.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

SIZE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 32, 3, 4


@dataclass(frozen=True)
class Names:
    """Where things are: a block's modules by site; ``special`` tokens before the patches; the last ``norms``."""

    blocks: str
    special: int
    norms: tuple[str, ...]
    attention: str = "attention"
    mlp: str = "mlp"
    z: str = "attention.o_proj"
    q: str = "attention.q_proj"
    k: str = "attention.k_proj"
    v: str = "attention.v_proj"
    scales: tuple[str, str] | None = None


_TOWER = {
    "blocks": "vision_model.encoder.layers",
    "attention": "self_attn",
    "z": "self_attn.out_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
}
_LAMBDA, _SCALE = ("lambda_1", "lambda_2"), ("layer_scale1", "layer_scale2")

NAMES = {
    "vit": Names("vit.layers", 1, ("vit.layernorm",)),
    "vit_msn": Names("vit.layers", 1, ("vit.layernorm",)),
    "deit": Names("deit.layers", 2, ("deit.layernorm",)),
    "deit_with_teacher": Names("deit.layers", 2, ("deit.layernorm",)),
    "beit": Names("beit.layers", 1, ("beit.pooler.layernorm",), scales=_LAMBDA),
    "beit_cls": Names("beit.layers", 1, ("beit.layernorm",), scales=_LAMBDA),
    "data2vec": Names(
        "data2vec_vision.encoder.layer",
        1,
        ("data2vec_vision.pooler.layernorm",),
        mlp="output",
        z="attention.output.dense",
        q="attention.attention.query",
        k="attention.attention.key",
        v="attention.attention.value",
        scales=_LAMBDA,
    ),
    "ijepa": Names("ijepa.layers", 0, ("ijepa.layernorm",)),
    "dinov2": Names("dinov2.encoder.layer", 1, ("dinov2.layernorm",), scales=_SCALE),
    "dinov2_registers": Names(
        "dinov2_with_registers.encoder.layer", 1 + 2, ("dinov2_with_registers.layernorm",), scales=_SCALE
    ),
    "clip": Names(special=1, norms=(), **_TOWER),
    "siglip": Names(special=0, norms=("vision_model.post_layernorm",), **_TOWER),
    "siglip2": Names(special=0, norms=("vision_model.post_layernorm",), **_TOWER),
    "dinov3": Names("backbone.model.layer", 1 + 2, ("backbone.norm",), scales=_SCALE),
    "clip_zero_shot": Names(special=1, norms=("vision_model.post_layernorm",), **_TOWER),
    "siglip_zero_shot": Names(special=0, norms=("vision_model.post_layernorm",), **_TOWER),
}

ZERO_SHOT = ("clip_zero_shot", "siglip_zero_shot")


def checkpoint_of(folder: Path, family: str):
    """How a saved model of a family is named to the project."""
    from vitpatch.models.checkpoint import Checkpoint
    from vitpatch.models.zero_shot import ZeroShotCheckpoint

    if family in ZERO_SHOT:
        return ZeroShotCheckpoint(str(folder), prompts=("a photo of a {}.", "{}"))
    head = str(folder / "head.safetensors") if family == "dinov3" else None
    return Checkpoint(str(folder), head_path=head)


def save_family(path: Path, family: str, names: list[str], seed: int = 0, pixels: int = SIZE, patch: int = PATCH):
    """A random classifier of a family whose answers differ between images, with its image processor."""
    import transformers as hf

    torch.manual_seed(seed)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=pixels)
    sizes |= dict(patch_size=patch, initializer_range=0.25)
    inner = sizes | dict(intermediate_size=64)
    labels = dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    scale = dict(layer_scale_init_value=0.5)
    bias = dict(use_relative_position_bias=True)
    made = {
        "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**inner, **labels)),
        "vit_msn": lambda: hf.ViTMSNForImageClassification(hf.ViTMSNConfig(**inner, **labels)),
        "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**inner, **labels)),
        "deit_with_teacher": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**inner, **labels)),
        "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**inner, **labels, **scale, **bias)),
        "beit_cls": lambda: hf.BeitForImageClassification(
            hf.BeitConfig(**inner, **labels, use_mean_pooling=False, use_shared_relative_position_bias=True)
        ),
        "data2vec": lambda: hf.Data2VecVisionForImageClassification(
            hf.Data2VecVisionConfig(**inner, **labels, **scale, **bias, use_shared_relative_position_bias=True)
        ),
        "ijepa": lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**inner, **labels)),
        "dinov2": lambda: hf.Dinov2ForImageClassification(
            hf.Dinov2Config(**sizes | dict(image_size=pixels * 3 // 2), mlp_ratio=2, layerscale_value=0.5, **labels)
        ),
        "dinov2_registers": lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(
                **sizes, mlp_ratio=2, use_swiglu_ffn=True, layerscale_value=0.5, num_register_tokens=2, **labels
            )
        ),
        "clip": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=inner, **labels)),
        "siglip": lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=inner, **labels)),
        "siglip2": lambda: hf.Siglip2ForImageClassification(
            hf.Siglip2Config(vision_config=inner | dict(num_patches=(pixels // patch) ** 2), **labels)
        ),
        "dinov3": lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**inner, num_register_tokens=2, layerscale_value=0.5, key_bias=True)
        ),
        "clip_zero_shot": lambda: hf.CLIPModel(
            hf.CLIPConfig(vision_config=inner, text_config=text, projection_dim=24, logit_scale_init_value=1.0)
        ),
        "siglip_zero_shot": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=inner, text_config=text)),
    }
    text = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
    text |= dict(max_position_embeddings=77, projection_size=WIDTH, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model = made[family]().eval()
    if family in ZERO_SHOT:
        save_tokenizer(path, names)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "logit_scale":
                weight.fill_(4.0)
            elif "classifier" in name:
                weight.normal_(std=0.5)
            elif any(word in name for word in ("relative_position", "position_emb", "cls_token", "register")):
                weight.normal_(std=0.3)
            elif weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=0.25)
            elif name.endswith("bias"):
                weight.normal_(std=0.1)
    model.save_pretrained(path)
    if family == "dinov3":
        from safetensors.torch import save_file

        head = {"weight": torch.randn(len(names), 2 * WIDTH) / 2, "bias": torch.randn(len(names)) / 10}
        save_file(head, path / "head.safetensors")
    half = [0.5] * 3
    size = {"height": pixels, "width": pixels}
    hf.ViTImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(path)
    return path


def save_tokenizer(path: Path, names: list[str]) -> None:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[BOS]",
        "[EOS]",
        "[UNK]",
        "a",
        "photo",
        "of",
        ".",
        *sorted({w for n in names for w in n.replace("_", " ").split()}, key=lambda w: (w.isdigit(), w)),
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)


class Brute:
    """A model run whole for every patch; values are (batch, tokens, channels) as the modules have them."""

    def __init__(self, model, names: Names, logits=lambda out: out.logits):
        self.model, self.names, self._logits = model, names, logits
        self.blocks = list(model.get_submodule(names.blocks))

    def _place(self, site, layer):
        block = self.blocks[layer]
        if site.startswith("resid"):
            return block, site == "resid_pre"
        path = {"attn_out": "attention", "mlp_out": "mlp"}.get(site, site)
        return block.get_submodule(getattr(self.names, path)), site == "z"

    @torch.no_grad()
    def run(self, pixels, acts=()):
        """Logits with ``acts`` {(site, layer): value → value or None}."""
        handles = []

        def first(args, kwargs):
            return args[0] if args else kwargs["hidden_states"]

        def on_input(act):
            def hook(module, args, kwargs):
                new = act(first(args, kwargs))
                if new is None:
                    return None
                return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

            return hook

        def on_output(act):
            def hook(module, args, out):
                new = act(out[0] if isinstance(out, tuple) else out)
                if new is None:
                    return None
                return (new, *out[1:]) if isinstance(out, tuple) else new

            return hook

        for (site, layer), act in dict(acts).items():
            module, is_input = self._place(site, layer)
            if is_input:
                handles.append(module.register_forward_pre_hook(on_input(act), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(on_output(act)))
        try:
            return self._logits(self.model(pixel_values=pixels))
        finally:
            for handle in handles:
                handle.remove()

    def values(self, pixels, places):
        """The value of each place in a run."""
        kept = {}
        self.run(pixels, {place: (lambda value, place=place: kept.update({place: value.clone()})) for place in places})
        return kept

    def patched(self, clean, corrupt, sites, window=1, tokens=slice(None), head=None):
        """Logits of denoising each layer's window at a site, or several together, (layers, batch, classes)."""
        depth, sites = len(self.blocks), [sites] if isinstance(sites, str) else sites
        donor = self.values(clean, [(site, layer) for site in sites for layer in range(depth)])

        def put(site, layer):
            def act(value):
                new, channels = value.clone(), slice(None)
                if head is not None:
                    each = value.shape[-1] // HEADS
                    channels = slice(head * each, (head + 1) * each)
                new[:, tokens, channels] = donor[site, layer][:, tokens, channels]
                return new

            return act

        logits = []
        for centre in range(depth):
            layers = [centre - window // 2 + i for i in range(window)]
            places = [(site, x) for site in sites for x in layers if 0 <= x < depth]
            logits.append(self.run(corrupt, {place: put(*place) for place in places}))
        return torch.stack(logits)

    @torch.no_grad()
    def direct(self, clean, corrupt, site):
        """Logits of each layer's change carried straight to the last norm, its scale frozen at the corrupt run's."""
        last, scales = len(self.blocks) - 1, {}

        def scaled(layer, value):
            if self.names.scales is None or site.startswith("resid"):
                return value
            scale = getattr(self.blocks[layer], self.names.scales[site == "mlp_out"], None)
            if scale is None or isinstance(scale, float):
                return value
            return scale(value) if isinstance(scale, torch.nn.Module) else scale * value

        def at_norms(make):
            return [self.model.get_submodule(path).register_forward_hook(make(path)) for path in self.names.norms]

        def note(path):
            def hook(module, args, out):
                scales[path] = (args[0].var(-1, keepdim=True, unbiased=False) + module.eps).rsqrt()

            return hook

        def freeze(path):
            def hook(module, args, out):
                x = args[0]
                return (x - x.mean(-1, keepdim=True)) * scales[path] * module.weight + module.bias

            return hook

        handles = at_norms(note)
        places = [(site, layer) for layer in range(last + 1)]
        theirs, own = self.values(clean, places), self.values(corrupt, places)  # the corrupt run is the last noted
        for handle in handles:
            handle.remove()
        handles = at_norms(freeze)
        try:
            changes = [scaled(x, theirs[site, x]) - scaled(x, own[site, x]) for x in range(last + 1)]
            return torch.stack(
                [
                    self.run(corrupt, {("resid_post", last): lambda value, change=change: value + change})
                    for change in changes
                ]
            )
        finally:
            for handle in handles:
                handle.remove()
