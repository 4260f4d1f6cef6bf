import numpy as np
import pytest
import torch

from vitpatch.errors import VitPatchError
from vitpatch.patching.executor import token_masks
from vitpatch.patching.plan import possible_tokens
from vitpatch.types import Sizes, token_position

SIZES = Sizes(depth=2, heads=2, special=("cls", "register_0", "register_1"), grid=(2, 4), reads=1)


def where(name, blocks=None):
    return np.flatnonzero(possible_tokens(name, SIZES, blocks)).tolist()


@pytest.mark.parametrize(
    ("name", "blocks", "tokens"),
    [
        ("all", None, list(range(11))),
        ("cls", None, [0]),
        ("registers", None, [1, 2]),
        ("patches", None, [3, 4, 5, 6, 7, 8, 9, 10]),
        ("each:cls", None, [0]),
        ("each:register_1", None, [2]),
        ("each:1x2", None, [9]),
        ("grid:0x1", (1, 2), [5, 6, 9, 10]),
        ("grid:1x0", (2, 2), [7, 8]),
    ],
)
def test_where_a_group_is(name, blocks, tokens):
    assert where(name, blocks) == tokens


def test_cells_have_rows_and_columns():
    assert (
        token_position("each:3x12"),
        token_position("grid:0x1"),
        token_position("each:cls"),
        token_position("all"),
    ) == ((3, 12), (0, 1), None, None)


def masks():
    """Two images of 8 × 16 pixels: the object covers a patch and half of its right neighbour; three eighths of one."""
    pixels = torch.zeros(2, 1, 8, 16)
    pixels[0, :, :4, :6] = 1
    pixels[1, :, :3, :2] = 1
    return pixels


def test_a_patch_is_object_where_at_least_half_of_it_is():
    groups = ("object", "background", "random_object", "all")
    of_object, background, drawn, everything = token_masks(groups, SIZES, None, masks(), [5, 6], seed=0)
    assert [row.nonzero().flatten().tolist() for row in of_object] == [[3, 4], []]
    assert [row.nonzero().flatten().tolist() for row in background] == [[5, 6, 7, 8, 9, 10], list(range(3, 11))]
    assert drawn.sum(1).tolist() == [2, 0] and not drawn[:, :3].any() and everything.all()


def test_the_random_object_is_of_seed_and_image_alone():
    pixels = masks()[:1].expand(6, -1, -1, -1)
    draw = lambda ids, seed: token_masks(("random_object",), SIZES, None, pixels[: len(ids)], ids, seed)[0]  # noqa: E731
    together = draw([0, 1, 2, 3, 4, 5], 0)
    assert torch.equal(draw([4], 0)[0], together[4]) and torch.equal(draw([4, 1], 0)[1], together[1])
    assert not torch.equal(draw([0, 1, 2, 3, 4, 5], 1), together)
    assert len({tuple(row.tolist()) for row in together}) > 1


def test_masks_are_asked_for_where_they_are_needed():
    with pytest.raises(VitPatchError, match=r"^tokens background: the data have no object masks.*mask_column"):
        token_masks(("all", "background"), SIZES, None, None, [0], seed=0)


def test_a_rest_that_no_patch_covers_is_not_of_the_mask(tmp_path):
    """A SigLIP of 5 × 5 patches of 8 pixels on images of 44: 4 pixels at the right and below are not seen."""
    from families import save_family
    from transformers import AutoModelForImageClassification

    import vitpatch

    names = [f"class_{i}" for i in range(3)]
    model = AutoModelForImageClassification.from_pretrained(save_family(tmp_path, "siglip", names, pixels=44))
    masks = torch.zeros(2, 1, 44, 44)
    masks[:, :, 24:40, 24:40] = 1  # the last four patches, all of each
    pixels = torch.randn(2, 3, 44, 44, generator=torch.Generator().manual_seed(0))
    groups = ["object", "background", "random_object"]
    table = vitpatch.patch(model, pixels, -pixels, [0, 1], window=1, tokens=groups, masks=masks)
    assert table.groupby("tokens")["n_tokens"].unique().map(list).to_dict() == {
        "object": [4], "background": [21], "random_object": [4]
    }  # fmt: skip
