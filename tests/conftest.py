"""Tiny models and images that the tests make, and ways to run the project on them."""

import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.pop("WANDB_API_KEY", None)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tiny models: a second thread only waits

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CLASSES, SIZE, DEPTH = 5, 32, 4
NAMES = [f"class_{c}" for c in range(CLASSES)]


def pictures(n: int, size: int = SIZE, seed: int = 0):
    """n coloured RGB images: blocks of random colour with some grain."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    blocks = rng.random((n, 4, 4, 3)).repeat(size // 4, 1).repeat(size // 4, 2)
    pixels = 0.7 * blocks + 0.3 * rng.random((n, size, size, 3))
    return [Image.fromarray((image * 255).astype("uint8")) for image in pixels]


def write_parquet(path: Path, images, labels, names=NAMES, **columns) -> Path:
    from datasets import ClassLabel, Dataset, Features, Image, Value

    kinds = {name: Image() if name == "mask" else Value("string") for name in columns}
    label = ClassLabel(names=names) if names else Value("int64")
    features = Features({"image": Image(), "label": label, **kinds})
    Dataset.from_dict({"image": images, "label": labels, **columns}, features=features).to_parquet(str(path))
    return path


def save_model(path: Path, family: str, names=NAMES, size: int = SIZE, seed: int = 0, **config) -> Path:
    """A random classifier whose answers differ visibly between images, with its image processor."""
    import transformers as hf

    torch.manual_seed(seed)
    shape = dict(image_size=size, patch_size=8, hidden_size=32, num_hidden_layers=DEPTH, num_attention_heads=4)
    labels = dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    kinds = {
        "vit": (hf.ViTConfig, hf.ViTForImageClassification),
        "deit": (hf.DeiTConfig, hf.DeiTForImageClassification),
        "deit_with_teacher": (hf.DeiTConfig, hf.DeiTForImageClassificationWithTeacher),
    }
    config_class, model_class = kinds[family]
    everything = shape | labels | dict(intermediate_size=64, initializer_range=0.25) | config
    model = model_class(config_class(**everything))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "classifier" in name and name.endswith("weight"):
                weight.normal_(std=0.5)
    model.eval().save_pretrained(path)
    half = [0.5] * 3
    hf.ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with images.parquet (13 images, 5 classes) and the models vit, deit, deit_with_teacher."""
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("made")
    labels = [i % CLASSES for i in range(13)]
    write_parquet(folder / "images.parquet", pictures(13), labels)
    for family in ("vit", "deit", "deit_with_teacher"):
        save_model(folder / family, family)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a tiny model of a family of ``families.py``, made once."""
    from families import save_family

    folder, there = tmp_path_factory.mktemp("families"), {}

    def get(family: str) -> Path:
        if family not in there:
            there[family] = save_family(folder / family, family, NAMES)
        return there[family]

    return get


@pytest.fixture
def config(made):
    """Composes patch.yaml on the made model and images, without a tracker; overrides come last.

    Plain values of keys are set as Hydra sets them, in what it composed once of all other overrides: a composition
    takes longer than many a test.
    """
    from composed import composed, composed_once, parsed_once
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def make(*overrides: str, family: str = "vit"):
        tiny = ["model=hf", f"model.path={made / family}", "data=parquet", f"data.path={made / 'images.parquet'}"]
        every = [*tiny, "trainer=cpu", "logger=none", "batch_size=5", *overrides]
        parsed = [parsed_once(override) for override in every]
        plain = [o for o in parsed if not (o.is_add() or o.is_delete() or (ROOT / "conf" / o.key_or_group).is_dir())]
        cfg = copy.deepcopy(composed_once("patch", *(o.input_line for o in parsed if o not in plain)))
        try:
            for override in plain:
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return composed("patch", *every)  # Hydra's own error
        return cfg

    return make


@pytest.fixture
def patched(config, tmp_path, monkeypatch):
    """Makes a run in this process; the run's folder, another ``folder`` for each run of a test.

    Its pictures, which take longest, only where they are wanted; without them the run keeps ``kept`` images for each
    page of examples.
    """
    from vitpatch.runs import batches, reading
    from vitpatch.runs import run as room

    draw = room.draw

    def make(*overrides: str, folder: str = "run", family: str = "vit", pictures: bool = False, kept: int = 2) -> Path:
        for drawing in (room, reading):
            monkeypatch.setattr(drawing, "draw", draw if pictures else lambda *everything: {})
        if not pictures:
            monkeypatch.setattr(batches, "IMAGES_A_PAGE", kept)
        room.run(config(*overrides, family=family), tmp_path / folder)
        return tmp_path / folder

    return make


@pytest.fixture
def small_pictures(monkeypatch):
    """Pictures of runs are small, with few images a page: for those who do not look at their looks."""
    from vitpatch.plots import layout
    from vitpatch.runs import batches

    save = layout.save_figure
    monkeypatch.setattr(layout, "save_figure", lambda figure, path, kind, dpi: save(figure, path, kind, 40))
    monkeypatch.setattr(batches, "IMAGES_A_PAGE", 2)


@pytest.fixture
def tables_only(monkeypatch):
    """Comparisons without figures and page, which take longest."""
    from vitpatch.compare import compare

    monkeypatch.setattr(compare, "make_figures", lambda comparison: [])
    monkeypatch.setattr(compare, "write_page", lambda comparison, figures, file: None)


@pytest.fixture
def cli(monkeypatch, capfd):
    """``python patch.py …`` in this process, without figures: (exit code, what it printed).

    A run's own ``pictures`` are drawn where they are asked for; a sweep's comparison has tables and a page.
    """

    def call(*arguments: str, script: str = "patch", pictures: bool = False) -> tuple[int, str]:
        import logging
        import runpy
        import signal

        from vitpatch.compare import compare
        from vitpatch.errors import SIGNALS
        from vitpatch.runs import run

        monkeypatch.setattr(compare, "make_figures", lambda comparison: [])
        if not pictures:
            monkeypatch.setattr(run, "draw", lambda *everything: {})
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        signals = {number: signal.getsignal(number) for number in SIGNALS}
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code
        finally:  # Hydra's handlers hold streams and files of this call
            for handler in set(root.handlers) - set(handlers):
                handler.close()
            root.handlers[:] = handlers
            root.setLevel(level)
            for number, handler in signals.items():
                signal.signal(number, handler)
        printed = capfd.readouterr()
        return code, printed.out + printed.err

    return call
