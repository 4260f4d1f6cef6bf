"""A cache as ``hf download`` leaves it, with tiny stand-ins for the checkpoints and data sets that ``conf/`` names.

Config, image processor and tokenizer have the form that the hub's files have; the weights' names are transformers 4's.
"""

import hashlib
import json
from pathlib import Path

import torch
from conftest import pictures
from families import save_family

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HALF, IMAGENET = [0.5] * 3, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
OF_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
FLAGS = {"do_normalize": True, "do_resize": True}
OLD = {**FLAGS, "image_mean": HALF, "image_std": HALF, "resample": 2, "size": 224}
CROPPED = {**FLAGS, "crop_size": 224, "do_center_crop": True, "resample": 3}
RESCALED = {**FLAGS, "do_rescale": True, "rescale_factor": 0.00392156862745098}
OF_DINO = {
    **RESCALED,
    **IMAGENET,
    "image_processor_type": "BitImageProcessor",
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "resample": 3,
    "size": {"shortest_edge": 256},
}
OF_SIGLIP = {
    **RESCALED,
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor",
    "image_mean": HALF,
    "image_std": HALF,
    "resample": 3,
    "size": {"height": 224, "width": 224},
}
OF_DEIT = {**CROPPED, **IMAGENET, "feature_extractor_type": "DeiTFeatureExtractor", "size": 256}
OF_CLIPS = {**CROPPED, **OF_CLIP, "feature_extractor_type": "CLIPFeatureExtractor", "size": 224}
OF_BEIT = {**OLD, "feature_extractor_type": "BeitFeatureExtractor", "crop_size": 224, "do_center_crop": False}

MODELS = {  # option → hub id, family, patch, image processor
    "vit_b16_cifar10": ("aaraki/vit-base-patch16-224-in21k-finetuned-cifar10", "vit", 16, OLD),
    "vit_b16_cifar100": ("Ahmed9275/Vit-Cifar100", "vit", 16, {**OLD, "feature_extractor_type": "ViTFeatureExtractor"}),
    "vit_b16_imagenet": ("google/vit-base-patch16-224", "vit", 16, OLD),
    "vit_l16_imagenet": ("google/vit-large-patch16-224", "vit", 16, OLD),
    "deit_s16": ("facebook/deit-small-patch16-224", "vit", 16, OF_DEIT),
    "deit_b16": ("facebook/deit-base-patch16-224", "vit", 16, OF_DEIT),
    "deit_b16_distilled": ("facebook/deit-base-distilled-patch16-224", "deit_with_teacher", 16, OF_DEIT),
    "beit_b16": ("microsoft/beit-base-patch16-224", "beit", 16, OF_BEIT),
    "dinov2_s14": ("facebook/dinov2-small-imagenet1k-1-layer", "dinov2", 14, OF_DINO),
    "dinov2_b14": ("facebook/dinov2-base-imagenet1k-1-layer", "dinov2", 14, OF_DINO),
    "clip_b32": ("openai/clip-vit-base-patch32", "clip_zero_shot", 32, OF_CLIPS),
    "clip_l14": ("openai/clip-vit-large-patch14", "clip_zero_shot", 14, OF_CLIPS),
    "siglip_b16": ("google/siglip-base-patch16-224", "siglip_zero_shot", 16, OF_SIGLIP),
}
DATA = {  # option → hub id, folder of its files, split, image and label column
    "cifar10": ("uoft-cs/cifar10", "plain_text", "test", "img", "label"),
    "cifar100": ("uoft-cs/cifar100", "cifar100", "test", "img", "fine_label"),
    "imagenet": ("ILSVRC/imagenet-1k", "data", "validation", "image", "label"),
}


def names_of(data: str) -> list[str]:
    """The class names that a data set has, and its models; ImageNet's models say ``crane`` twice, the data not."""
    from vitpatch.data.labels import _synsets

    names = {"cifar10": CIFAR10, "cifar100": [f"kind_{i}" for i in range(100)]}.get(data) or list(_synsets().values())
    return [f"{name}2" if name in names[:i] else name for i, name in enumerate(names)]


def data_module(model: str) -> str:
    """The data set that a named model classifies."""
    return model.rpartition("_")[2] if "cifar" in model else "imagenet"


def commit_of(name: str) -> str:
    """Forty hex digits for a repository."""
    return hashlib.sha1(name.encode()).hexdigest()


def repository(cache: Path, kind: str, name: str) -> Path:
    """A new folder in a cache for the files of a ``model`` or ``dataset``."""
    root, commit = cache / f"{kind}s--{name.replace('/', '--')}", commit_of(name)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / commit


def put_model(cache: Path, option: str) -> str:
    """A tiny model under the hub id of an option of ``conf/model``; the id."""
    name, family, patch, processor = MODELS[option]
    folder = repository(cache, "model", name)
    names = [name.removesuffix("2") if name == "crane2" else name for name in names_of(data_module(option))]
    save_family(folder, family, names, pixels=224, patch=patch)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    if option == "vit_b16_cifar10":
        only_pickle(folder)
    if family == "clip_zero_shot":
        clip_tokenizer(folder)
    if family == "siglip_zero_shot":
        siglip_tokenizer(folder)
    return name


def only_pickle(folder: Path) -> None:
    """Leaves of a model's weights ``pytorch_model.bin`` alone."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    assert any(".attention.attention.query." in name for name in weights)  # the names of transformers 4
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def put_data(cache: Path, option: str, number: int = 6) -> str:
    """A few images under the hub id of an option of ``conf/data``, in its layout; the id."""
    from datasets import ClassLabel, Dataset, Features, Image

    name, folder, split, image, label = DATA[option]
    root, names = repository(cache, "dataset", name), names_of(option)
    (root / folder).mkdir()
    files = "".join(f"  - split: {s}\n    path: {folder}/{s}-*\n" for s in ("train", split))
    config = "plain_text" if option == "cifar10" else option if option == "cifar100" else "default"
    head = f"configs:\n- config_name: {config}\n  data_files:\n{files}  default: true\n"
    (root / "README.md").write_text(f"---\n{head}---\n")
    coarse = {"coarse_label": ClassLabel(names=["plants", "things"])} if option == "cifar100" else {}
    features = Features({image: Image(), label: ClassLabel(names=names), **coarse})
    for part, rows in (("train", 2), (split, number)):
        columns = {image: pictures(rows, size=32 if "cifar" in option else 64), label: list(range(rows))}
        columns |= {"coarse_label": [i % 2 for i in range(rows)]} if coarse else {}
        data = Dataset.from_dict(columns, features=features)
        data.to_parquet(str(root / folder / f"{part}-00000-of-00001.parquet"))
    return name


def clip_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with single letters for a vocabulary, in its four files."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    tokenizer.save_pretrained(folder)


def siglip_tokenizer(folder: Path) -> None:
    """SigLIP's tokenizer: a sentencepiece model, trained on the spot."""
    import io

    import sentencepiece
    from transformers import SiglipTokenizer

    text = io.BytesIO()
    words = iter([f"this is a photo of {name}" for name in names_of("imagenet")])
    quiet = {"minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_writer=text, vocab_size=200, **quiet)
    (folder / "trained.model").write_bytes(text.getvalue())
    SiglipTokenizer(str(folder / "trained.model")).save_pretrained(folder)
    (folder / "trained.model").unlink()
