from dataclasses import replace

import numpy as np
import pytest
import torch
from corruption_makers import MAKERS, batch
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter, sobel

from vitpatch import corruptions
from vitpatch.corruptions.base import Blur, Chain, Gray, Identity, Noise, as_corruption, luma, uniform
from vitpatch.corruptions.counterfactual import BackgroundSwap, OtherImage
from vitpatch.corruptions.masked import Occlude
from vitpatch.corruptions.structure import Edges, LowPass, PatchShuffle, PhaseScramble, odd_draws
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch

RANDOM = (Noise(0.3), PhaseScramble(120.0), PatchShuffle(4), Occlude(amount=0.5), Chain([Noise(0.1), Noise(0.1)]))


def test_gray_is_bt601_luma_in_three_channels():
    image = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    out = Gray()(ImageBatch(image, torch.tensor([0]), torch.tensor([0])), seed=0)
    assert out.flatten().tolist() == pytest.approx([0.299 + 0.587 * 0.5 + 0.114 * 0.25] * 3, abs=1e-7)


def test_every_class_of_the_package_is_tried():
    exported = {getattr(corruptions, name) for name in corruptions.__all__}
    classes = {of for of in exported if isinstance(of, type) and issubclass(of, corruptions.Corruption)}
    assert classes - {*MAKERS} == {corruptions.Corruption, corruptions.Identity, corruptions.EmbeddingNoise}


@pytest.mark.parametrize("kind", MAKERS)
def test_strength_zero_is_the_identity_exactly_and_damage_grows_from_there(kind):
    images, make = batch(), MAKERS[kind]
    strongest = make(0.0).strongest
    made = [make(share * strongest)(images, seed=0) for share in (0.0, 0.25, 0.5, 1.0)]
    assert torch.equal(made[0], images.images)
    damage = [float((one - images.images).abs().mean()) for one in made]
    assert damage == sorted(damage) and damage[1] < damage[3] and damage[3] > 0.02
    for one in made:
        assert one.shape == images.images.shape and one.dtype == torch.float32
        assert 0 <= one.min() and one.max() <= 1 + 1e-6


@pytest.mark.parametrize("kind", MAKERS)
def test_what_a_class_says_of_itself_holds(kind):
    made = MAKERS[kind](0.5)
    assert getattr(made, made.strength_key) == 0.5
    alone = replace(batch(), masks=None, others=None)
    if made.needs_masks or made.partner:
        what = "partner" if made.partner else "object masks.*data.mask_column.*data=emoji_scenes"
        with pytest.raises(VitPatchError, match=rf"corruption {made.option_name} needs .*{what}"):
            made(replace(alone, masks=batch().masks if made.partner else None), 0)
    else:
        assert made(alone, 0).shape == alone.images.shape
    with pytest.raises(VitPatchError, match=rf"corruption.{made.strength_key} -1: expected a number"):
        MAKERS[kind](-1)
    if made.strength_key == "amount":
        with pytest.raises(VitPatchError, match=r"corruption.amount 1.5: expected a number from 0 to 1, the share"):
            MAKERS[kind](1.5)


def test_the_identity_leaves_the_images():
    assert Identity()(batch(), seed=0) is not None and torch.equal(Identity()(batch(), seed=0), batch().images)


@pytest.mark.parametrize("corruption", RANDOM, ids=lambda corruption: corruption.class_name)
def test_what_is_random_is_a_function_of_seed_and_image_alone(corruption):
    whole = corruption(batch(range(8)), seed=0)
    alone = torch.cat([corruption(batch([i]), seed=0) for i in range(8)])
    backwards = corruption(batch(range(7, -1, -1)), seed=0).flip(0)
    assert torch.equal(whole, alone) and torch.equal(whole, backwards)
    assert not torch.equal(whole, corruption(batch(range(8)), seed=1))
    same = replace(batch([0, 1]), images=batch([0]).images.expand(2, -1, -1, -1), masks=batch([0, 0]).masks)
    first, second = corruption(same, seed=0)
    assert not torch.allclose(first, second, atol=0.1)  # one image under two ids: two draws


def test_noise_has_the_asked_for_spread_and_clips_only_when_asked():
    many = ImageBatch(torch.full((50, 3, 16, 16), 0.5), torch.arange(50), torch.zeros(50, dtype=torch.int64))
    added = Noise(0.3, clip=False)(many, seed=0) - 0.5
    assert float(added.std()) == pytest.approx(0.3, rel=0.02)
    assert float(added.mean()) == pytest.approx(0.0, abs=0.006)
    assert float(added.abs().max()) > 0.5
    clipped = Noise(0.3)(many, seed=0)
    assert torch.equal(clipped, (added + 0.5).clamp(0, 1))


@pytest.mark.parametrize("sigma", [0.5, 1.5, 3.0, 8.0])
def test_blur_is_scipys_gaussian_filter(sigma):
    images = batch()
    want = gaussian_filter(images.images.double().numpy(), sigma, mode="nearest", axes=(2, 3), truncate=4.0)
    assert np.abs(Blur(sigma)(images, seed=0).numpy() - want).max() < 2e-6


def test_a_negative_strength_is_refused():
    wrong = (-0.1, float("nan"), float("inf"), "abc", None, True)
    for make in (lambda v: Noise(v), lambda v: Blur(v)):
        for value in wrong:
            with pytest.raises(VitPatchError, match="expected a number"):
                make(value)
    with pytest.raises(VitPatchError, match="expected true or false"):
        Noise(0.1, clip="maybe")


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 18)])
def test_low_pass_is_a_butterworth_filter_of_the_cosine_transform(height, width):
    """The cosine transform is the Fourier transform of the mirrored image; its k-th basis has k/2 cycles a side."""
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    down, across = np.arange(height)[:, None] / (2 * height), np.arange(width) / (2 * width)
    cycles = np.hypot(down, across) * min(height, width)
    spectrum = dctn(images.double().numpy(), axes=(2, 3)) / (1 + (cycles / 3.0) ** 6)
    want = idctn(spectrum, axes=(2, 3)).clip(0, 1)
    out = LowPass(3.0)(ImageBatch(images, torch.arange(2), torch.arange(2)), 0)
    assert np.abs(out.numpy() - want).max() < 2e-6
    with pytest.raises(VitPatchError, match=r"cutoff 0: expected a number from 0.01 to 10,000, in cycles per image"):
        LowPass(0)


@pytest.mark.parametrize("size", [16, 15])
def test_phase_scramble_keeps_amplitudes_mean_and_the_relation_of_colours(size):
    images, scramble = batch(size=size), PhaseScramble(180.0)
    before, after = np.fft.fft2(images.images.double()), np.fft.fft2(scramble.unclipped(images, 0).double())
    assert np.abs(np.abs(before) - np.abs(after)).max() < 1e-4
    assert np.abs((before - after)[..., 0, 0]).max() < 1e-4  # the mean
    turned = np.angle(after / before)  # the same in the three channels
    assert np.abs(np.exp(1j * turned) - np.exp(1j * turned[:, :1])).max() < 1e-3
    free = np.abs(turned[:, 0]) > 1e-3
    assert 0.95 < free.mean() < 1.0
    assert np.abs(turned[:, 0][free]).mean() == pytest.approx(np.pi / 2, rel=0.1)  # uniform up to 180°
    assert np.array_equal(scramble(images, 0), scramble.unclipped(images, 0).clamp(0, 1))


@pytest.mark.parametrize("shape", [(16, 16), (15, 12)])
def test_the_field_of_phases_is_odd_and_uniform_on_both_sides_of_0(shape):
    images = replace(batch(), images=torch.zeros(6, 3, *shape))
    field = odd_draws(images, 0).numpy()
    down, across = (-np.arange(n) % n for n in shape)
    assert np.array_equal(field, -field[..., down[:, None], across])
    one_side = field[..., 1 : (shape[1] + 1) // 2]
    assert abs(one_side.mean()) < 0.06 and one_side.std() == pytest.approx(3**-0.5, rel=0.05)
    assert field.min() >= -1 and field.max() <= 1


def test_phases_move_by_at_most_the_width():
    images = batch()
    before, after = (np.fft.fft2(x.double()) for x in (images.images, PhaseScramble(60.0).unclipped(images, 0)))
    turned = np.degrees(np.abs(np.angle(after / before)))
    assert turned.max() < 60.1 and turned.max() > 55


def test_edges_are_the_sobel_magnitude_dark_on_white():
    images = batch()
    gray = luma(images.images)[:, 0].double().numpy()
    size = np.stack([np.hypot(*(sobel(one, axis=axis, mode="nearest") for axis in (0, 1))) / 4 for one in gray])
    want = 1 - size.clip(max=1)
    assert np.abs(Edges()(images, 0).numpy() - want[:, None]).max() < 2e-6
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    drawn = Edges()(ImageBatch(step, torch.tensor([0]), torch.tensor([0])), 0)
    assert drawn[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("amount", "moved"), [(1.0, 16), (0.5, 8), (0.25, 4), (0.05, 2), (0.03, 0)])
def test_patch_shuffle_permutes_cells_and_moves_as_many_as_asked(amount, moved):
    images = batch()
    out = PatchShuffle(4, amount)(images, 0)
    for before, after in zip(images.images, out, strict=True):
        cells = [
            [x[:, r : r + 4, c : c + 4].flatten().tolist() for r in range(0, 16, 4) for c in range(0, 16, 4)]
            for x in (before, after)
        ]
        assert sorted(cells[0]) == sorted(cells[1])
        assert sum(a != b for a, b in zip(*cells, strict=True)) == moved


def test_a_grid_that_does_not_divide_the_image_is_refused():
    with pytest.raises(VitPatchError, match=r"corruption.grid 5: does not divide .* 16 × 16 pixels; take 2 or 4 or 8"):
        PatchShuffle(5)(batch(), 0)
    for grid in (1, 2.0, True, "4"):
        with pytest.raises(VitPatchError, match=r"corruption.grid .*whole number, 2 or more"):
            PatchShuffle(grid)


def test_steps_of_a_kind_in_a_chain_have_their_own_draws():
    images = replace(batch(), images=torch.full((6, 3, 16, 16), 0.5))
    noise = Noise(0.2, clip=False)
    first = noise(images, 0) - 0.5
    assert torch.equal(Chain([noise])(images, 0), noise(images, 0))  # alone, as without a chain
    second = Chain([noise, noise])(images, 0) - 0.5 - first
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.05
    assert float(second.std()) == pytest.approx(0.2, rel=0.05)
    third = Chain([noise, noise, noise])(images, 0) - 0.5 - first - second
    assert abs(float(torch.corrcoef(torch.stack([third.flatten(), second.flatten()]))[0, 1])) < 0.05


def test_a_chain_is_its_steps_one_after_another_and_says_what_they_need():
    images = batch()
    want = Blur(1.0)(replace(images, images=Gray()(images, 0)), 0)
    assert torch.equal(Chain([Gray(), Blur(1.0)])(images, 0), want)
    assert torch.equal(Chain([Chain([Gray()]), Blur(1.0)])(images, 0), want)
    chain = Chain([Gray(), BackgroundSwap("same_class")])
    assert chain.needs_masks and chain.partner == "same_class"
    assert not Chain([Gray()]).needs_masks and Chain([Gray()]).partner is None
    with pytest.raises(VitPatchError, match="partners of several kinds \\(other_class, same_class\\)"):
        Chain([OtherImage("same_class"), BackgroundSwap("other_class")])
    for steps in ([], ["gray"], "gray", 3):
        with pytest.raises(VitPatchError, match=r"corruption.steps .*expected a list of corruptions"):
            Chain(steps)


def test_draws_are_spread_over_the_unit_interval():
    draws = uniform(batch(range(40)), 0, 500)
    assert draws.shape == (40, 500) and 0 <= draws.min() and draws.max() < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.01) and float(draws.std()) == pytest.approx(
        12**-0.5, abs=0.01
    )


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda images: (images * 255).byte(), "gave uint8; expected floating-point pixels"),
        (lambda images: images * 255, r"gave pixels up to 2\d\d; expected .* on the \[0, 1\] scale"),
        (lambda images: images / torch.tensor([1.0, 0.0, 1.0])[:, None, None, None], "not finite, of image 1"),
    ],
)
def test_pixels_of_a_users_class_are_on_the_scale_of_images(act, says):
    pixels = torch.rand(3, 3, 8, 8)
    pixels[0, 0, 0, 0] = 1.0
    images = ImageBatch(pixels, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(VitPatchError, match=says):
        as_corruption(lambda images, seed: act(images.images)).pixels(images, 0)
    wide = as_corruption(lambda images, seed: 3 * images.images - 1)
    assert wide.pixels(images, 0).max() > 1  # noise may leave it
    assert Noise(std=40.0, clip=False).pixels(images, 0).abs().max() > 30
