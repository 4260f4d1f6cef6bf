"""Corruptions by mask and by another image: what changes, and what does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from corruption_makers import batch

from vitpatch.corruptions.base import luma
from vitpatch.corruptions.counterfactual import BackgroundSwap, OtherImage
from vitpatch.corruptions.masked import (
    BackgroundOnly,
    DesaturateBackground,
    DesaturateObject,
    ObjectOnly,
    Occlude,
    Silhouette,
    bounding_boxes,
    inpaint,
)
from vitpatch.errors import VitPatchError
from vitpatch.types import ImageBatch


def where(images):
    """(object, background) of (batch, 3, height, width): where the mask is 1, and where it is 0."""
    masks = images.masks.expand_as(images.images)
    return masks == 1, masks == 0


def background_mean(images):
    """By a plain loop in float64, (batch, 3)."""
    weights = 1 - images.masks[:, 0].double().numpy()
    return np.stack(
        [(x.double().numpy() * w).sum((1, 2)) / w.sum() for x, w in zip(images.images, weights, strict=True)]
    )


def test_the_masks_of_these_tests_are_soft_and_have_an_inside_and_an_outside():
    inside, outside = where(batch())
    assert inside.any() and outside.any() and not (inside | outside).all()


@pytest.mark.parametrize(
    ("corruption", "kept"),
    [
        (DesaturateObject(), "background"),
        (DesaturateBackground(), "object"),
        (Silhouette("mean", "keep"), "background"),
        (Silhouette("black", "keep"), "background"),
        (ObjectOnly("black"), "object"),
        (Occlude(), "background"),
        (BackgroundSwap(), "object"),
    ],
)
def test_the_other_region_is_left_to_the_bit_and_this_one_changed(corruption, kept):
    images = batch()
    inside, outside = where(images)
    same, other = (inside, outside) if kept == "object" else (outside, inside)
    out = corruption(images, 0)
    assert torch.equal(out[same], images.images[same])
    assert (out[other] != images.images[other]).float().mean() > 0.95


def test_colour_goes_by_the_soft_mask():
    images = batch()
    m = images.masks
    gray = luma(images.images)
    assert torch.allclose(DesaturateObject()(images, 0), m * gray + (1 - m) * images.images, atol=1e-6)
    assert torch.allclose(
        DesaturateBackground(0.5)(images, 0), images.images + 0.5 * (1 - m) * (gray - images.images), atol=1e-6
    )


def test_a_silhouettes_mean_fill_keeps_the_objects_mean_colour_and_black_does_not():
    images = batch()
    hard = replace(images, masks=images.masks.round())
    inside = hard.masks.bool()[:, 0]
    out, black = Silhouette()(hard, 0), Silhouette("black")(hard, 0)
    for i in range(len(images)):
        mean = images.images[i][:, inside[i]].mean(1)
        assert torch.allclose(out[i][:, inside[i]], mean[:, None].expand(-1, int(inside[i].sum())), atol=1e-6)
        assert (out[i][:, ~inside[i]] == 1).all() and (black[i][:, inside[i]] == 0).all()
    soft = Silhouette()(images, 0)
    weights = images.masks / images.masks.sum((2, 3), keepdim=True)
    mean = (images.images * weights).sum((2, 3), keepdim=True)
    assert torch.allclose(soft, images.masks * mean + 1 - images.masks, atol=1e-5)


@pytest.mark.parametrize(("fill", "value"), [("gray", 0.5), ("white", 1.0), ("black", 0.0), ("mean", None)])
def test_what_fills_a_hole(fill, value):
    images = batch()
    inside, outside = where(images)
    want = background_mean(images)[:, :, None, None] if value is None else np.full((6, 3, 1, 1), value)
    want = torch.from_numpy(want).float().expand_as(images.images)
    box = bounding_boxes(images.masks).expand_as(images.images)
    assert torch.allclose(ObjectOnly(fill)(images, 0)[outside], want[outside], atol=1e-6)
    assert torch.allclose(Occlude(fill)(images, 0)[inside], want[inside], atol=1e-6)
    out = BackgroundOnly(fill)(images, 0)
    assert torch.allclose(out[box], want[box], atol=1e-6)
    assert torch.equal(out[~box & outside], images.images[~box & outside]) and (~box & outside).any()


def test_a_box_is_the_smallest_around_the_object():
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, 0, 2, 3] = masks[0, 0, 5, 1] = 1
    masks[1, 0, 7, 7] = 0.04  # no more than what resizing smears
    masks[2] = 1
    want = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    want[0, 0, 2:6, 1:4] = want[2] = True
    assert torch.equal(bounding_boxes(masks), want)


def test_as_much_of_the_object_is_covered_as_asked_from_one_side_and_growing():
    images, earlier = batch(size=32), None
    area = images.masks.sum((1, 2, 3))
    for amount in (0.2, 0.5, 0.8, 1.0):
        covered = Occlude(amount=amount)._cover(images, 0)
        share = (covered * images.masks).sum((1, 2, 3)) / area
        assert (share - amount).abs().max() <= 1 / area.min() + 1e-6
        assert earlier is None or (covered >= earlier).all()
        earlier = covered
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    covered = Occlude(amount=0.5)._cover(images, 0)[:, 0].bool()
    for one, mask in zip(covered, images.masks[:, 0] > 0, strict=True):
        toward = torch.stack([(grid[one & mask].mean() - grid[~one & mask].mean()) for grid in (rows, columns)])
        along = (rows * toward[0] + columns * toward[1]) / toward.norm()
        assert along[one & mask].min() > along[~one & mask].max() - 1.5  # a straight border, by pixels


def test_objects_are_covered_from_all_sides():
    images = batch(range(40), size=32)
    covered = Occlude(amount=0.5)._cover(images, 0) * images.masks
    along = torch.arange(32.0) - 15.5
    down, across = ((covered * axis).sum((1, 2, 3)) for axis in (along[:, None], along))
    quarters = [int(((down > 0) == d).logical_and((across > 0) == a).sum()) for d in (0, 1) for a in (0, 1)]
    assert min(quarters) >= 4


def test_an_object_nowhere_or_everywhere_gives_numbers():
    for value in (0.0, 1.0):
        images = replace(batch(), masks=torch.full((6, 1, 16, 16), value))
        for corruption in (Silhouette(), ObjectOnly(), BackgroundOnly(), Occlude(), Occlude("mean"), BackgroundSwap()):
            images = replace(images, others=replace(images.others, masks=images.masks))
            assert torch.isfinite(corruption(images, 0)).all()
    nowhere = replace(batch(), masks=torch.zeros(6, 1, 16, 16))
    assert torch.equal(Occlude()(nowhere, 0), nowhere.images)


def test_the_partners_background_stands_behind_the_object():
    images = batch()
    out = BackgroundSwap()(images, 0)
    seen = ((images.masks == 0) & (images.others.masks == 0)).expand_as(out)
    assert torch.equal(out[seen], images.others.images[seen]) and seen.any()
    inside, _ = where(images.others)
    repainted = replace(images.others, images=torch.where(inside, 0.5, images.others.images))
    assert torch.equal(BackgroundSwap()(replace(images, others=repainted), 0), out)  # its object has no part in it
    assert (inside & (images.masks == 0)).any()


def test_a_hole_is_filled_from_around_it_alone():
    images = batch(size=32)
    hole = (images.masks > 0).float()
    left = torch.arange(32) < 16
    two = torch.where(left, 0.2, 0.8).expand_as(images.images)  # a dark and a light half
    ground = inpaint(torch.where(hole > 0, images.images, two), hole)
    assert torch.equal(ground[(hole == 0).expand_as(ground)], two[(hole == 0).expand_as(two)])
    assert torch.equal(ground, inpaint(torch.where(hole > 0, 1 - images.images, two), hole))
    assert ((ground >= 0.2 - 1e-5) & (ground <= 0.8 + 1e-5)).all()
    inside = hole.bool()[:, 0]
    assert all(
        g[0][i & left].mean() < 0.45 and g[0][i & ~left].mean() > 0.55 for g, i in zip(ground, inside, strict=True)
    )


@pytest.mark.parametrize("kind", ["same_class", "other_class", "nearest_luminance", "pair"])
def test_the_partner_is_of_the_kind_that_is_asked_for(kind):
    images = batch()
    assert OtherImage(kind).partner == kind == BackgroundSwap(kind).partner
    by_kind = {kind: images.others}
    assert torch.equal(OtherImage(kind).pixels(replace(images, others=None, partners=by_kind), 0), images.others.images)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Silhouette("red"), r"corruption.fill 'red': expected mean or black"),
        (lambda: Silhouette(bg="none"), r"corruption.bg 'none': expected white or keep"),
        (lambda: ObjectOnly("blue"), r"corruption.fill 'blue': expected one of mean, gray, white, black"),
        (lambda: OtherImage("twin"), r"corruption.kind 'twin': expected one of same_class, other_class, nearest_lum"),
        (lambda: BackgroundSwap(3), r"corruption.kind 3: expected one of"),
        (lambda: Occlude(amount="half"), r"corruption.amount 'half': expected a number from 0 to 1"),
    ],
)
def test_a_wrong_value_is_one_line(make, says):
    with pytest.raises(VitPatchError, match=says):
        make()


def test_a_background_swap_needs_the_partners_masks_too():
    images = batch()
    bare = ImageBatch(images.others.images, images.others.ids, images.others.labels)
    with pytest.raises(VitPatchError, match="background_swap needs object masks"):
        BackgroundSwap()(replace(images, others=bare), 0)
