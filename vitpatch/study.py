"""What a run measures, its ``Study``, and how its numbers are read, its ``View``; both from a config. No torch.

And whether a target fits a model, of which only the sizes are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypedDict

from vitpatch import NUMBERS_VERSION
from vitpatch.checks import (
    Count,
    Expected,
    Ge,
    Positive,
    Seed,
    check,
    check_types,
    is_list,
    one_of,
    parse_window,
    read_inclusion,
)
from vitpatch.errors import ArgumentError, VitPatchError
from vitpatch.formatting import corruption_words, data_name, digest, model_name, transfer_words
from vitpatch.types import (
    ALL_IMAGES,
    EVERY_HEAD,
    JOINT,
    MULTI_LABEL,
    WINDOW_WORDS,
    BaseRun,
    Direction,
    Donor,
    Inclusion,
    Interval,
    Metric,
    Site,
    Sizes,
    Target,
    Tested,
    TokenGroup,
    format_window,
)


@dataclass(frozen=True, kw_only=True)
class View:
    """How the numbers of a run are read: nothing that its model computes depends on it.

    ``metric`` is the headline metric; ``logit_diff`` is taken against the runner-up of the base run ``rival``; the
    means are over the images of ``include``; ``interval`` and ``test`` are the methods of intervals and p.
    """

    metric: Metric = Metric.PROB
    rival: BaseRun = BaseRun.CORRUPT
    include: Inclusion = ALL_IMAGES
    interval: Interval = Interval.PERCENTILE
    test: Tested = Tested.LOG_ODDS

    def as_config(self) -> dict[str, str]:
        """By key its value, as a config has it."""
        return {field.name: str(getattr(self, field.name)) for field in fields(View)}

    @property
    def of_tables(self) -> tuple[Metric, BaseRun, Inclusion]:
        """The part that the tables of images depend on."""
        return self.metric, self.rival, self.include

    @property
    def view_id(self) -> str:
        """The digest of the view, and of the version of the numbers."""
        return digest({"numbers_version": NUMBERS_VERSION, **self.as_config()})

    def shows_corruption(self, donor: Donor, direction: Direction) -> bool:
        """Whether the corruption can change the effects: its run is recipient or donor, chooses images or the rival."""
        is_patched = donor is Donor.PAIR or direction is Direction.DENOISE
        names_the_rival = self.metric is Metric.LOGIT_DIFF and self.rival is BaseRun.CORRUPT
        return is_patched or names_the_rival or self.include.selects_on_the_outcome


VIEW_KEYS = tuple(field.name for field in fields(View))


def without_view(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of what a run computed: that of earlier versions held the view, too."""
    return {key: value for key, value in identity.items() if key not in VIEW_KEYS}


@dataclass(frozen=True, kw_only=True)
class Study(View):
    """What a run measures, apart from its model, data and corruption, and how it is read.

    ``controls``: other images as donors too, ``None`` = where window is 1. ``synergy``: single layers, and windows
    without each of their layers, too. ``wanted_width`` of an interval at the peak, ``None`` = a tenth of the total
    effect.
    """

    target: Target
    windows: tuple[int, ...]
    direction: Direction
    seed: int
    donor: Donor = Donor.PAIR
    controls: bool | None = None
    synergy: bool = False
    wanted_width: float | None = None

    @property
    def view(self) -> View:
        """How it is read."""
        return View(**{name: getattr(self, name) for name in VIEW_KEYS})

    def read_as(self, view: View) -> Study:
        """The same study in another view; a width that was wanted in another metric's unit is none."""
        return replace(self, **vars(view), wanted_width=self.wanted_width if view.metric is self.metric else None)

    @property
    def depends_on_corruption(self) -> bool:
        """Whether the corruption can change the effects."""
        return self.shows_corruption(self.donor, self.direction)


class ViewKeys(TypedDict):
    """The keys of a view; of type ``Any`` those that a function of their own reads."""

    metric: Metric
    rival: BaseRun
    include: Any
    interval: Interval
    test: Tested


class StudyKeys(ViewKeys):
    """The keys of a study."""

    window: Any
    direction: Direction
    donor: Donor
    controls: bool | None
    synergy: bool
    wanted_width: Annotated[Positive, "in the metric's unit"] | None
    seed: Seed


def read_view(config: Mapping[str, Any]) -> View:
    """How a config asks for numbers to be read. Raises ``VitPatchError`` for a value that is wrong."""
    check_types(config, ViewKeys)
    return View(
        metric=Metric(config["metric"]),
        rival=BaseRun(config["rival"]),
        include=read_inclusion(config["include"]),
        interval=Interval(config["interval"]),
        test=Tested(config["test"]),
    )


def read_study(config: Mapping[str, Any]) -> Study:
    """What a composed config asks for. Raises ``VitPatchError`` for a value that is wrong whatever the model is."""
    check_types(config, StudyKeys)
    study = Study(
        **vars(read_view(config)),
        target=read_target(config["target"]),
        windows=read_windows(config["window"]),
        direction=Direction(config["direction"]),
        seed=config["seed"],
        donor=Donor(config["donor"]),
        controls=config["controls"],
        synergy=config["synergy"],
        wanted_width=config["wanted_width"],
    )
    _check_donor(study)
    return study


Layer = Annotated[int, Ge(0), Expected("all, a layer, or a list of layers such as [0,3]")]
Head = Annotated[int, Ge(0), Expected("all, joint, a head, or a list of heads such as [0,3]")]


def read_target(target: Mapping[str, Any]) -> Target:
    """The site, layers, tokens and heads of the group ``target``. Raises ``VitPatchError``."""
    layers, heads, grid = target["layers"], target["heads"], target["grid"]
    if heads not in (None, EVERY_HEAD, JOINT):
        heads = tuple(dict.fromkeys(_as_list("target.heads", heads, Head)))
    if grid is not None and not (is_list(grid) and len(grid) == 2):
        raise VitPatchError(f"target.grid {grid!r}: expected [rows,columns], for instance [4,4]")
    result = Target(
        site=one_of("target.site", target["site"], Site),
        layers=None if layers == "all" else tuple(dict.fromkeys(_as_list("target.layers", layers, Layer))),
        tokens=tuple(map(TokenGroup, _as_list("target.tokens", target["tokens"], TokenGroup))),
        heads=heads,
        grid=grid if grid is None else tuple(_as_list("target.grid", grid, Count)),
    )
    if TokenGroup.GRID in result.tokens and grid is None:
        raise VitPatchError("target.tokens grid: say its blocks too, for instance target.grid=[4,4]")
    return result


def read_windows(value: Any) -> tuple[int, ...]:
    """The windows, each once, as ``Patch.window`` has them. Raises ``VitPatchError``."""
    return tuple(dict.fromkeys(map(parse_window, _as_list("window", value))))


def _check_donor(study: Study) -> None:
    donor = study.donor
    if donor.is_constant and study.direction is not Direction.NOISE:
        raise VitPatchError(f"direction {study.direction} with donor={donor}: goes into the clean run; leave it out")
    if study.controls and donor is not Donor.PAIR:
        raise VitPatchError(f"controls true with donor={donor}: controls stand beside donor=pair; leave one out")
    if study.synergy and study.target.one_head_at_a_time:
        raise VitPatchError("synergy true with single heads: these have no windows; use target.heads=joint")
    if study.synergy and set(study.windows) == {1}:
        raise VitPatchError("synergy true with window 1: is of windows of several layers; use window=3 or [1,3]")


def _as_list(key: str, value: Any, declared: Any = Any) -> list[Any]:
    """A list's values, or the one value, each of the ``declared`` type."""
    if is_list(value) and not value:
        raise VitPatchError(f"{key}: an empty list; expected at least one")
    return [check(key, one, declared) for one in (value if is_list(value) else [value])]


def run_title(
    config: Mapping[str, Any],
    study: Study,
    *,
    readout: str | None = None,
    problem_type: str | None = None,
    calibrated: str | None = None,
) -> str:
    """A run in a line: model, data, corruption, and what ``study_title`` has.

    Of the model: which of several heads is its ``readout``, and its ``problem_type``; ``calibrated``: to which damage
    the corruption is.
    """
    model = config["model"]
    also = ["untrained"] * bool(model.get("random_init")) + [readout] * (readout is not None)
    also += ["multi-label"] * (problem_type == MULTI_LABEL)
    more = f" ({', '.join(also)})" * bool(also)
    parts = [f"{model_name(model)}{more} on {data_name(config['data'])}"]
    if study.depends_on_corruption:
        parts.append(corruption_words(config["corruption"]) + f" calibrated to {calibrated}" * (calibrated is not None))
    return " · ".join([*parts, study_title(study)])


def study_title(study: Study) -> str:
    """What is patched in a line: the site, the window, what is put into what, and how it is read."""
    target, place = study.target, str(study.target.site)
    if target.heads is not None:
        place += " of all heads" if target.heads == JOINT else " by head"
    if target.tokens != (TokenGroup.ALL,):
        place += f" at {' and '.join(target.tokens)}"
    parts = [place, f"window {', '.join(map(format_window, study.windows))}"]
    parts.append(transfer_words(study.donor, study.direction))
    parts += [f"on {study.metric}"] * (study.metric is not Metric.PROB)
    parts += [f"{study.include} images"] * (study.include != ALL_IMAGES)
    return " · ".join(parts)


def check_target(target: Target, windows: Sequence[int], sizes: Sizes) -> None:
    """Raises ``VitPatchError`` where a window, a layer, a head or a token group does not fit a model of ``sizes``."""
    depth = sizes.depth
    for window in windows:
        if window not in WINDOW_WORDS.values() and not 1 <= window <= depth:
            raise VitPatchError(f"window {window}: the model has {depth} layers; use 1 to {depth}, prefix or suffix")
        if target.one_head_at_a_time and window != 1:
            raise VitPatchError(
                f"window {format_window(window)} with target={target.site}: a head has no identity across layers; "
                "use window=1, or heads=joint for all heads together"
            )
    for layer in target.layers or ():
        if not 0 <= layer < depth:
            raise ArgumentError(f"layers {layer}: the model has {depth} layers; use 0 to {depth - 1}")
    if target.site.by_head != (target.heads is not None):
        wants = "all, joint or a list of heads" if target.site.by_head else "null: it is not split by head"
        raise ArgumentError(f"heads {target.heads}: of {target.site} expected {wants}")
    for head in target.heads if isinstance(target.heads, tuple) else ():
        if not 0 <= head < sizes.heads:
            raise ArgumentError(f"heads {head}: the model has {sizes.heads} heads; use 0 to {sizes.heads - 1}")
    if target.grid is not None and TokenGroup.GRID not in target.tokens:
        raise ArgumentError(f"grid {list(target.grid)}: is only of tokens=grid; leave it out")
    token_names(target, sizes)


def token_names(target: Target, sizes: Sizes) -> tuple[str, ...]:
    """The names of a target's token groups, ``each`` and ``grid`` spelt out: ``each:0x3``, ``grid:1x0``.

    Raises ``ArgumentError`` for a group that the model does not have.
    """
    return tuple(dict.fromkeys(name for group in target.tokens for name in _expand_group(group, target, sizes)))


def _expand_group(group: TokenGroup, target: Target, sizes: Sizes) -> list[str]:
    rows, columns = sizes.grid
    names = []
    if group is TokenGroup.EACH:
        names = [f"each:{name}" for name in sizes.special]
    elif group is TokenGroup.GRID:
        if target.grid is None:
            raise ArgumentError("tokens grid: say its blocks too, for instance grid=[4,4]")
        if rows % target.grid[0] or columns % target.grid[1]:
            raise ArgumentError(
                f"grid {list(target.grid)}: does not divide the model's {rows} × {columns} image patches"
            )
        rows, columns = target.grid
    else:
        has = {TokenGroup.CLS: "cls" in sizes.special, TokenGroup.REGISTERS: bool(registers_of(sizes))}
        if not has.get(group, True):
            raise ArgumentError(f"tokens {group}: the model has none; before its patches: {list(sizes.special)}")
        return [str(group)]
    return names + [f"{group}:{row}x{column}" for row in range(rows) for column in range(columns)]


def registers_of(sizes: Sizes) -> list[int]:
    """The positions of the register tokens."""
    return [i for i, name in enumerate(sizes.special) if name.startswith("register")]
