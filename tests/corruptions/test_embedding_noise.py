"""Noise on patch embeddings: its draws, its scale, and that a model takes it where the convolution hands it on."""

import numpy as np
import pytest
import torch
from conftest import NAMES, save_model
from families import NAMES as FAMILY_NAMES
from families import SIZE, Brute, checkpoint_of

from vitpatch.corruptions.base import Noise
from vitpatch.corruptions.embedding_noise import EmbeddingNoise, measure_moments
from vitpatch.errors import VitPatchError
from vitpatch.models.checkpoint import Checkpoint
from vitpatch.types import ImageBatch

PATCHES, WIDTH = 16, 12


def drawn(ids, seed=0, draw=0, std=1.0, spread=1.0):
    return (
        EmbeddingNoise(std).with_spread(spread).embedding_noise(torch.tensor(list(ids)), seed, (PATCHES, WIDTH), draw)
    )


def test_a_draw_is_a_function_of_seed_id_and_number_alone():
    whole = drawn(range(5))
    assert torch.equal(whole, torch.cat([drawn([i]) for i in range(5)]))
    assert torch.equal(whole, drawn(range(4, -1, -1)).flip(0))
    others = [drawn([0], seed=1), drawn([1]), drawn([0], draw=1), drawn([0], draw=2)]
    for one in others:
        assert (one - whole[:1]).abs().mean() > 0.5
    assert torch.equal(drawn(range(5), std=3.0), 3 * whole)  # the same draws at all strengths


def test_draws_are_not_those_of_pixel_noise():
    image = ImageBatch(torch.zeros(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0]))
    of_pixels = Noise(1.0, clip=False)(image, seed=0).flatten()
    of_embeddings = drawn([0]).flatten()
    assert len(of_pixels) == len(of_embeddings) == 192
    assert abs(np.corrcoef(of_pixels, of_embeddings)[0, 1]) < 0.3


def test_noise_has_the_asked_for_spread():
    ids = range(200)
    assert float(drawn(ids, std=3.0, spread=0.5).std()) == pytest.approx(1.5, rel=0.01)
    spread = np.linspace(0.1, 2, WIDTH)
    by_channel = drawn(ids, std=2.0, spread=spread).std((0, 1)).numpy()
    assert by_channel == pytest.approx(2 * spread, rel=0.06)


def test_the_pixels_are_left_alone_and_only_it_is_on_embeddings():
    image = ImageBatch(torch.rand(2, 3, 8, 8), torch.arange(2), torch.zeros(2, dtype=torch.int64))
    corruption = EmbeddingNoise(3.0)
    assert corruption.with_spread(1.0)(image, 0) is image.images
    assert corruption.is_inside_model and corruption.needs_training and corruption.strength_key == "std"
    assert not Noise(0.1).is_inside_model and not Noise(0.1).needs_training
    assert Noise(0.1).embedding_noise(image.ids, 0, (PATCHES, WIDTH)) is None
    with pytest.raises(AssertionError, match="with_statistics"):
        corruption.embedding_noise(image.ids, 0, (PATCHES, WIDTH))
    assert corruption.with_spread(1.0) is not corruption and corruption.spread is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"std": -1.0}, "corruption.std -1.0"),
        ({"scale": "layer"}, "corruption.scale 'layer'.*global or channel"),
        ({"draws": 0}, "corruption.draws 0"),
        ({"draws": True}, "corruption.draws True"),
    ],
)
def test_a_wrong_key_is_refused(wrong, says):
    with pytest.raises(VitPatchError, match=says):
        EmbeddingNoise(**wrong)


def test_the_spread_is_that_of_all_values_at_once():
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(30, PATCHES, WIDTH, generator=generator) * torch.linspace(0.1, 2, WIDTH) + 1e4
    found = measure_moments([values[:7], values[7:8], values[8:]])
    whole = values.double()
    assert float(found.spread("global")) == pytest.approx(float(whole.std()), rel=1e-10)
    assert found.spread("channel") == pytest.approx(whole.flatten(0, 1).std(0).numpy(), rel=1e-8)
    about_own_means = whole.flatten(0, 1).sub(whole.flatten(0, 1).mean(0)).std()
    shifted = values + torch.arange(WIDTH)  # means of channels that differ are part of the pooled spread
    assert float(measure_moments([shifted]).spread("global")) > 1.5 * float(about_own_means)


# --- in a model ---


def pixels_of(n=3, size=SIZE):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise_for(model, n=3):
    return 0.5 * torch.randn(n, *model.embedding_shape, generator=torch.Generator().manual_seed(2))


def convolution(model):
    found = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(found) == 1
    return found[0]


def one_by_one(noise):
    """A hook that adds noise to each patch of the convolution's output."""

    def hook(module, args, output):
        output = output.clone()
        for patch in range(noise.shape[1]):
            output[:, :, patch // output.shape[3], patch % output.shape[3]] += noise[:, patch]
        return output

    return hook


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", [family for family in FAMILY_NAMES if family != "siglip2"])
@torch.no_grad()
def test_every_family_takes_noise_where_the_convolution_hands_it_on(family, saved):
    model, pixels = checkpoint_of(saved(family), family).load(NAMES), pixels_of()
    noise, hooks = noise_for(model), hooks_of(model)
    brute = Brute(model.model, FAMILY_NAMES[family])
    plain, stream = model(pixels), model.embed(pixels)
    handle = convolution(model.model).register_forward_hook(one_by_one(noise))
    want, want_stream = brute.run(pixels), brute.values(pixels, [("resid_pre", 0)])["resid_pre", 0]
    handle.remove()
    assert (model(pixels, noise) - want).abs().max() < 1e-5
    assert (model.embed(pixels, noise) - want_stream).abs().max() < 1e-5
    assert (want - plain).abs().max() > 0.01 and (want_stream - stream).abs().max() > 0.1
    assert torch.equal(want_stream[:, : len(model.sizes.special)], stream[:, : len(model.sizes.special)])
    assert torch.equal(model(pixels, 0 * noise), plain) and torch.equal(model.embed(pixels, 0 * noise), stream)
    assert torch.equal(model(pixels), plain) and hooks_of(model) == hooks


@torch.no_grad()
def test_patch_embeddings_are_pixels_times_the_kernel(saved):
    model, pixels = checkpoint_of(saved("dinov2"), "dinov2").load(NAMES), pixels_of()
    module = convolution(model.model)
    cut = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    want = cut @ module.weight.flatten(1).T + module.bias
    hooks = hooks_of(model)
    assert (model.patch_embeddings(pixels) - want).abs().max() < 1e-5
    assert hooks_of(model) == hooks


@torch.no_grad()
def test_a_rest_of_the_image_that_no_patch_covers_does_not_matter(tmp_path):
    model = Checkpoint(str(save_model(tmp_path / "m", "vit", size=36, patch_size=8))).load(NAMES)
    pixels, noise = pixels_of(size=36), noise_for(model)
    assert model.embedding_shape == (16, 32)
    handle = convolution(model.model).register_forward_hook(one_by_one(noise))
    want = model.model(pixel_values=pixels).logits
    handle.remove()
    assert torch.equal(model(pixels, noise), want)


def test_no_hook_is_left_behind_an_exception(saved):
    model = checkpoint_of(saved("vit"), "vit").load(NAMES)
    hooks = hooks_of(model)
    with pytest.raises(AssertionError, match="noise"):
        model(pixels_of(), noise_for(model)[:, :-1])
    with pytest.raises(AssertionError, match="noise"):
        model.embed(pixels_of(), noise_for(model)[:2])
    assert hooks_of(model) == hooks


def test_a_model_without_the_convolution_is_refused_in_one_line(saved):
    model = checkpoint_of(saved("siglip2"), "siglip2").load(NAMES)
    pixels = pixels_of()
    for ask in (lambda: model.embedding_shape, lambda: model.patch_embeddings(pixels), lambda: model(pixels, 1)):
        with pytest.raises(VitPatchError, match=r"embedding_noise: SigLIP 2 .*use a corruption of pixels"):
            ask()
