import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from vitpatch.corruptions import Blur, Gray, Identity, Noise
from vitpatch.spec import ImageBatch, VitPatchError


def batch(ids=range(6), size=16):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(100, 3, size, size, generator=generator)
    ids = torch.tensor(list(ids))
    return ImageBatch(images[ids], ids, torch.zeros(len(ids), dtype=torch.int64))


def test_gray_is_bt601_luma_in_three_channels():
    image = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1)
    out = Gray()(ImageBatch(image, torch.tensor([0]), torch.tensor([0])), seed=0)
    assert out.flatten().tolist() == pytest.approx([0.299 + 0.587 * 0.5 + 0.114 * 0.25] * 3, abs=1e-7)


def test_strength_zero_is_the_identity_exactly():
    images = batch()
    for corruption in (Identity(), Noise(0.0), Noise(0.0, clip=False), Blur(0.0)):
        assert torch.equal(corruption(images, seed=0), images.images)


def test_noise_has_the_asked_for_spread_and_clips_only_when_asked():
    many = ImageBatch(torch.full((50, 3, 16, 16), 0.5), torch.arange(50), torch.zeros(50, dtype=torch.int64))
    added = Noise(0.3, clip=False)(many, seed=0) - 0.5
    assert float(added.std()) == pytest.approx(0.3, rel=0.02)
    assert float(added.mean()) == pytest.approx(0.0, abs=0.006)
    assert float(added.abs().max()) > 0.5
    clipped = Noise(0.3)(many, seed=0)
    assert torch.equal(clipped, (added + 0.5).clamp(0, 1))


def test_noise_is_a_function_of_seed_and_image_alone():
    whole = Noise(0.3)(batch(range(8)), seed=0)
    alone = torch.cat([Noise(0.3)(batch([i]), seed=0) for i in range(8)])
    backwards = Noise(0.3)(batch(range(7, -1, -1)), seed=0).flip(0)
    assert torch.equal(whole, alone) and torch.equal(whole, backwards)
    assert not torch.equal(whole, Noise(0.3)(batch(range(8)), seed=1))
    draws = Noise(1.0, clip=False)(batch(range(2)), seed=0) - batch(range(2)).images
    assert not torch.allclose(draws[0], draws[1], atol=0.1)


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
