"""What to run next, from a run's finding: which keys of ``patch.py`` to change, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from vitpatch.stats.finding import Finding, Places, Remedies
from vitpatch.stats.result import RunResult
from vitpatch.types import Direction, Donor, Metric, Site, Tested

MOST, MOST_LAYERS, FEW_IMAGES = 2, 4, 64
"""So many suggestions are made; heads are looked for in so many layers at most, else in all; and so many images are
asked for in place of one."""
STRENGTHS = ("_low", "_half", "", "_high")
"""How names of the options of one corruption end, from weak to strong."""


@dataclass(frozen=True)
class Possible:
    """What can be asked of a run's model and data, as far as it is known.

    ``stronger``: the option of the same corruption that is the next stronger, "" = none; ``limit``: how many images
    were asked for, ``None`` = all; ``has_cls``: whether the model has such a token; ``has_heads``: whether ``z`` can be
    patched.
    """

    stronger: str = ""
    limit: int | None = None
    has_cls: bool = False
    has_heads: bool = False


@dataclass(frozen=True)
class Suggestion:
    """Why to look further, in a few words, and the keys of ``patch.py`` to change."""

    reason: str
    overrides: Mapping[str, str] = field(default_factory=dict)


def stronger_option(option: str, options: Collection[str]) -> str:
    """The next stronger of the ``options`` of one corruption, by their names: ``noise`` → ``noise_high``; "" = none."""
    of_option = next((strength for strength in STRENGTHS if strength and option.endswith(strength)), "")
    ladder = [option.removesuffix(of_option) + strength for strength in STRENGTHS]
    stronger = ladder[ladder.index(option) + 1 :]
    return next((name for name in stronger if name in options), "")


def suggest(result: RunResult, finding: Finding, possible: Possible) -> list[Suggestion]:
    """At most ``MOST`` suggestions, the most telling first."""
    if finding.by_construction:
        every = _instead_of_the_whole_stream(possible)
    elif finding.remedies is not None:
        every = _for_a_larger_total(result, finding.remedies, possible)
    elif finding.takeover is not None:
        every = _after_a_takeover(result)
    elif finding.places:
        every = _after_places(result, finding.places[0], possible)
    else:
        every = iter([Suggestion("single layers", {"window": "1"})])
    return list(islice(every, MOST))


def _for_a_larger_total(result: RunResult, remedies: Remedies, possible: Possible) -> Iterator[Suggestion]:
    metric = None if remedies.metric is None else remedies.metric[0]
    if metric not in (None, Metric.KL):
        yield Suggestion(f"the same in {metric}, where the total effect is shown", {"metric": str(metric)})
    if possible.stronger:
        yield Suggestion("a stronger corruption", {"corruption": possible.stronger})
    if remedies.clean_correct is not None:
        yield Suggestion("only images that the clean run gets right", {"include": "clean_correct"})
    if remedies.clusters is not None and possible.limit is not None:
        yield _more_images(result, remedies.clusters, possible.limit)
    if metric is Metric.KL:
        yield Suggestion("where the answer changes at all, for the better or the worse", {"metric": "kl"})


def _instead_of_the_whole_stream(possible: Possible) -> Iterator[Suggestion]:
    if possible.has_cls:
        yield Suggestion("where the image moves from its patches to CLS", {"target": "handover", "window": "1"})
    yield Suggestion("what attention adds, layer by layer", {"target": "attn_out", "window": "1"})


def _after_a_takeover(result: RunResult) -> Iterator[Suggestion]:
    change = {"target": "attn_out", "target.tokens": "[cls]", "window": "1"}
    yield Suggestion("which layers' attention writes it to CLS", change)
    yield from _other_direction(result)


def _after_places(result: RunResult, places: Places, possible: Possible) -> Iterator[Suggestion]:
    study, site = result.study, Site(result.summary["site"].iloc[0])
    if result.clusters < 2:
        if possible.limit is not None:
            yield Suggestion("more images", {"data.limit": str(FEW_IMAGES)})
        return
    if places.best_is_shown:
        yield from _at_what_is_shown(result, places, possible)
    elif site.by_head:
        yield Suggestion("all heads of a layer together", {"target": "attn_out", "window": "1"})
    elif study.windows == (1,):
        yield Suggestion("several layers together", {"window": "3"})
    if site in (Site.ATTN_OUT, Site.MLP_OUT) and possible.has_cls and not study.donor.is_constant:
        yield Suggestion("where the image moves from its patches to CLS", {"target": "handover", "window": "1"})
    if places.clusters is not None and possible.limit is not None:
        yield _more_images(result, places.clusters, possible.limit)
    if places.shown:
        yield from _other_direction(result)


def _at_what_is_shown(result: RunResult, places: Places, possible: Possible) -> Iterator[Suggestion]:
    study, site = result.study, Site(result.summary["site"].iloc[0])
    has_controls = study.donor is Donor.PAIR and study.direction is Direction.DENOISE and _has_others(result)
    if 1 not in study.windows:
        yield Suggestion("single layers" + ", with other images as controls" * has_controls, {"window": "1"})
    elif has_controls and not result.controls:
        yield Suggestion("whether it is the image or its class", {"controls": "true"})
    if site is Site.ATTN_OUT and possible.has_heads:
        layers = sorted({int(layer) for layer in result.summary["layer"].iloc[list(places.alike)]})
        only = {"target.layers": str(layers).replace(" ", "")} if len(layers) <= MOST_LAYERS else {}
        yield Suggestion("which heads", {"target": "z", "window": "1"} | only)


def _more_images(result: RunResult, clusters: int, limit: int) -> Suggestion:
    """As many images as have so many clusters, more than there are."""
    images = -(-len(result.examples) * clusters // result.clusters)
    return Suggestion("more images", {"data.limit": str(max(images, limit + 1))})


def _has_others(result: RunResult) -> bool:
    """Whether images have others of their class, and of another, in other clusters."""
    clusters = result.examples.groupby("label")["cluster"].nunique()
    return len(clusters) > 1 and bool(clusters.max() > 1) and not result.labels_are_predicted


def _other_direction(result: RunResult) -> Iterator[Suggestion]:
    """Whether what suffices is also necessary, or the reverse, where the donor has two directions."""
    study = result.study
    has_sign = study.test is not Tested.HEADLINE or study.metric is not Metric.KL  # also when put into the clean run
    if study.donor is Donor.PAIR and study.direction is Direction.NOISE:
        yield Suggestion("whether the same places suffice", {"direction": "denoise"})
    elif study.donor is Donor.PAIR and has_sign:
        yield Suggestion("whether the same places are necessary", {"direction": "noise"})
