"""Where information goes, by layer → matplotlib figures: from the patches to CLS, and straight to the readout."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitpatch.plots import layout, style
from vitpatch.plots.profile import label_axes
from vitpatch.plots.style import Caption
from vitpatch.stats.inference import INERT

DIRECT, WHOLE = "direct_log_odds", "log_odds_effect"


def draw_handover(axes: Axes, summary: pd.DataFrame) -> None:
    """Share of the total effect recovered by the residual stream at CLS and at the image patches, by layer.

    A line marks the first layer at which CLS recovers more.
    """
    for level in (0, 1):
        axes.axhline(level, color="black", linewidth=0.8)
    groups = summary[summary["tokens"].isin(("cls", "patches"))].sort_values("tokens")
    for tokens, rows, look, x in style.each_series(groups, "tokens", apart=0):
        label = f"{summary['site'].iloc[0]} at {tokens}"
        style.draw_series(axes, x, rows, "recovered", label=label, **look)
    if (layer := takeover_layer(groups)) is not None:
        label = f"CLS recovers more than the patches from layer {layer} on"
        axes.axvline(layer, color=style.GREEN, linewidth=1.5, linestyle=":", zorder=1, label=label)
    label_axes(axes, summary, "share of the total effect recovered")


def takeover_layer(summary: pd.DataFrame) -> int | None:
    """The first layer at which CLS recovers more than the image patches; ``None`` where it does at none."""
    by_layer = summary.pivot(index="layer", columns="tokens", values="recovered").sort_index()
    is_ahead = (by_layer["cls"] > by_layer["patches"]).to_numpy()
    return int(by_layer.index[is_ahead.argmax()]) if is_ahead.any() else None


def handover(summary: pd.DataFrame, caption: Caption) -> Figure:
    """``draw_handover`` as a figure."""
    figure = layout.make_figure(8, 4.8)
    axes = figure.add_subplot()
    draw_handover(axes, summary)
    layout.add_legend(figure, axes)
    what = "handover: where the information moves to CLS"
    layout.set_headline(figure, caption.title, what, f"{caption.sample}; {caption.intervals}")
    return figure


def direct_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the series that have a direct effect; none where it is not known.

    A series has none by construction, say, of image patches where the classifier reads CLS alone.
    """
    is_direct = summary[DIRECT].abs() > INERT
    return (
        summary[is_direct.groupby(summary["series"]).transform("any")] if summary[DIRECT].notna().all() else summary[:0]
    )


def direct_effects(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Effect on the log odds and its direct share: by layer, or of many series as dots, direct against whole."""
    figure = layout.make_figure(8, 4.8)
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    number = summary["series"].nunique()
    if number > style.MOST_LINES // 2 or (number > 1 and not style.has_order(summary)):
        _draw_direct_points(axes, summary)
        layout.add_legend_below(figure, [axes])
    else:
        for name, rows, look, x in style.each_series(summary):
            prefix = f"{name}: " * bool(name)
            style.draw_series(axes, x, rows, WHOLE, label=f"{prefix}whole effect", **look)
            dotted = look | {"linestyle": ":", "markerfacecolor": "white"}
            style.draw_series(axes, x, rows, DIRECT, label=f"{prefix}direct effect", **dotted)
        label_axes(axes, summary, "change of the log odds of the true class (nats)")
        layout.add_legend(figure, axes)
    what = "direct: carried straight to the readout, last layer norm's scale frozen"
    layout.set_headline(figure, caption.title, what, f"{caption.sample}; {caption.intervals}")
    return figure


def _draw_direct_points(axes: Axes, summary: pd.DataFrame) -> None:
    x, y = summary[DIRECT], summary[WHOLE]
    points = axes.scatter(x, y, c=summary["layer"], cmap="viridis", s=18)
    axes.figure.colorbar(points, ax=axes, label="layer")
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=style.GREY, linewidth=1, linestyle="--", label="whole = direct")
    largest = summary.loc[y.abs().nlargest(style.NAMED).index].to_dict("records")
    style.name_points(axes, [(r[DIRECT], r[WHOLE], style.place_words(r["layer"], r["series"])) for r in largest])
    axes.set_xlabel("direct effect on the log odds of the true class (nats)")
    axes.set_ylabel("whole effect on the log odds\nof the true class (nats)")
    axes.grid(axis="y", alpha=0.25)
