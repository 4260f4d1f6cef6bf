"""Which other images a run asks for: as donors, as controls beside the image's own, and for its corruption."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from vitpatch.corruptions.pixels import Corruption, traits
from vitpatch.data.datamodule import Positions, mean_luminance
from vitpatch.data.images import LabelledImages
from vitpatch.data.partners import partners
from vitpatch.errors import VitPatchError
from vitpatch.formatting import counted
from vitpatch.models.preprocessing import Preprocessing
from vitpatch.types import Donor, Partner, Study

log = logging.getLogger(__name__)

CONTROLS = (Donor.SAME_CLASS, Donor.OTHER_CLASS)


def partners_of(
    study: Study, corruption: Corruption, images: LabelledImages, preprocessing: Preprocessing
) -> Positions:
    """Where each image's partners are, of the kinds that the corruption, the donor or its controls ask for.

    Raises ``VitPatchError`` where there cannot be any.
    """
    asked, donor = traits(corruption).partner, study.donor.partner
    by_label = {asked, donor} - {None, Partner.PAIR} or ({Partner.OTHER_CLASS} if study.controls else set())
    if by_label and not images.has_labels:
        raise VitPatchError(f"{' and '.join(sorted(by_label))} images: the data have no labels to go by")
    controls = {c.partner for c in CONTROLS} if has_controls(study) and images.has_labels else set()
    kinds = sorted(({asked, donor} | controls) - {None})
    found = {kind: found_of(kind, images, study.seed, preprocessing) for kind in kinds}
    if asked is not None:
        check_all(type(corruption).__name__, asked, found[asked], images)
    if donor is not None and (found[donor] < 0).all():
        raise VitPatchError(f"donor {study.donor}: no image has a {donor} partner in another cluster; use more images")
    return found


def check_all(corruption: str, kind: Partner, found: NDArray[np.int64], images: LabelledImages) -> None:
    """Raises ``VitPatchError`` where an image lacks the partner that a corruption asks for."""
    if (alone := np.flatnonzero(found < 0)).size:
        raise VitPatchError(
            f"corruption {corruption}: {len(alone)} of {counted(len(images), 'image')}, the first "
            f"{images.ids[alone[0]]}, have no {kind} partner in another cluster; choose another kind or more images"
        )


def found_of(kind: Partner, images: LabelledImages, seed: int, preprocessing: Preprocessing) -> NDArray[np.int64]:
    """Where the partners of one kind are. Raises ``VitPatchError`` where the data have no pairs."""
    if kind is Partner.PAIR:
        if images.columns.pair is None:
            raise VitPatchError("partner pair: the data have no pairs; name their column with data.pair_column")
        return np.arange(len(images))
    if kind is not Partner.NEAREST_LUMINANCE:
        return partners(kind, images.labels, images.clusters, seed)
    log.info("looking at the luminance of %s", counted(len(images), "image"))
    luminance = mean_luminance(images, preprocessing.to_input)
    found = partners(kind, images.labels, images.clusters, seed, luminance)
    return np.where(np.isnan(luminance), np.arange(len(images)), found)  # what cannot be read needs none


def has_controls(study: Study) -> bool:
    """Whether controls are asked for, or cost little: where window is 1."""
    if study.controls is not None:
        return study.controls
    return study.donor is Donor.PAIR and study.windows == (1,)


def donors_of(study: Study, found: Positions) -> tuple[Donor, ...]:
    """The run's donor, and the controls that some image has a partner for."""
    there = []
    for donor in CONTROLS if has_controls(study) else ():
        if donor.partner in found and (found[donor.partner] >= 0).any():
            there.append(donor)
        elif study.controls:
            raise VitPatchError(f"controls true: no image has a {donor} partner in another cluster; use more images")
        else:
            log.info("note: no image has a %s partner in another cluster; the run is without this control", donor)
    return (study.donor, *there)
