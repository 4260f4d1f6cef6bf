"""Notes on means: what a reader must know beside the finding."""

import numpy as np
import pytest
from measured import result_of

from vitpatch.runs.results import notes
from vitpatch.types import Include, Inclusion

RNG = np.random.default_rng(0)
TOTAL = 0.3 + 0.1 * RNG.normal(size=60)
RESULT = result_of(np.zeros((60, 2)), TOTAL)


@pytest.mark.parametrize(
    ("damage", "wanted", "said"),
    [("prob_drop", 0.3, False), ("prob_drop", 0.2, True), ("accuracy_drop", 0.75, False), ("accuracy_drop", 0.9, True)],
)
def test_a_calibration_that_the_run_does_not_bear_out_says_so(damage, wanted, said):
    """Three of four images are right in the clean run, none in the corrupted one."""
    texts = notes(RESULT, {"asked": f"{damage}:{wanted}", "damage": damage, "wanted": wanted})
    assert bool(texts) == said
    if said:
        own = TOTAL.mean() if damage == "prob_drop" else 0.75
        assert texts[0].startswith(f"calibrate={damage}:{wanted}: over these images the drop is {own:.3f} [")
        assert texts[0].endswith(f"which leaves the wanted {wanted} out")


def test_of_images_chosen_by_their_damage_it_says_nothing():
    wanted = {"asked": "prob_drop:0.9", "damage": "prob_drop", "wanted": 0.9}
    flipped = result_of(np.zeros((60, 2)), TOTAL, include=Inclusion(Include.FLIPPED))
    assert notes(RESULT, wanted) and not any("calibrate" in note for note in notes(flipped, wanted))
    assert notes(RESULT) == []


@pytest.mark.parametrize(("overlap", "warns"), [(0.4, False), (0.6, True)])
def test_a_random_object_that_is_mostly_the_object_is_a_warning(overlap, warns):
    result = result_of(np.zeros((60, 2)), TOTAL)
    result.examples["random_object_overlap"] = [np.nan, *[overlap] * 59]
    (text,) = notes(result)
    assert (
        text.startswith(f"of random_object's patches {overlap:.0%} are the object's, on av")
        and ("warning" in text) == warns
    )
