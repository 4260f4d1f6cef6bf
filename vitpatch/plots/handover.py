"""Where information goes, by layer → matplotlib figures: from the patches to CLS, and straight to the readout."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitpatch.plots import layout, style
from vitpatch.plots.finding import takeover_layer
from vitpatch.plots.profile import label_axes
from vitpatch.plots.style import Caption
from vitpatch.stats.finding import Takeover, read_takeover
from vitpatch.stats.inference import INERT

DIRECT, WHOLE = "direct_log_odds", "log_odds_effect"
LEAST_DIRECT = 0.02  # of the largest whole effect: a series whose direct effects are all smaller has none to show


def draw_handover(axes: Axes, summary: pd.DataFrame, takeover: Takeover | None = None) -> None:
    """Share of the total effect recovered by the residual stream at CLS and at the image patches, by layer.

    A line marks the layer at which CLS takes over, a band its interval where ``takeover`` has one; without it the layer
    is read from the summary.
    """
    for level in (0, 1):
        axes.axhline(level, color="black", linewidth=0.8)
    groups = summary[summary["tokens"].isin(("cls", "patches"))].sort_values("tokens")
    for tokens, rows, look, x in style.each_series(groups, "tokens"):
        label = f"{summary['site'].iloc[0]} at {tokens}"
        style.draw_series(axes, x, rows, "recovered", label=label, **look)
    takeover = takeover or read_takeover(summary)
    if takeover is not None and takeover.at < len(takeover.layers):
        _mark_takeover(axes, takeover)
    label_axes(axes, summary, "share of the total effect recovered")


def _mark_takeover(axes: Axes, takeover: Takeover) -> None:
    layers = [*takeover.layers, takeover.layers[-1] + 0.5]  # to the end of the axis, where the interval has no end
    label = f"CLS takes over from the patches at {takeover_layer(takeover)}"
    axes.axvline(layers[takeover.at], color=style.GREEN, linewidth=1.5, linestyle=":", zorder=1, label=label)
    if takeover.low is not None:
        axes.axvspan(layers[takeover.low], layers[takeover.high], color=style.GREEN, alpha=0.12, linewidth=0)


def handover(summary: pd.DataFrame, caption: Caption, takeover: Takeover | None = None) -> Figure:
    """``draw_handover`` as a figure."""
    figure = layout.make_figure(8, 4.6)
    axes = figure.add_subplot()
    draw_handover(axes, summary, takeover)
    layout.add_legend_below(figure, [axes], 2)
    what = "handover: where the information moves to CLS"
    layout.set_headline(figure, caption.title, what, f"{caption.sample}; {caption.intervals}")
    return figure


def direct_rows(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the series that have a direct effect; none where it is not known.

    A series has none by construction, say, of image patches where the classifier reads CLS alone, or next to none.
    """
    is_direct = summary[DIRECT].abs() > max(INERT, LEAST_DIRECT * summary[WHOLE].abs().max())
    return (
        summary[is_direct.groupby(summary["series"]).transform("any")] if summary[DIRECT].notna().all() else summary[:0]
    )


def direct_effects(summary: pd.DataFrame, caption: Caption) -> Figure:
    """Effect on the log odds and its direct share: by layer, or of many series as dots, direct against whole."""
    figure = layout.make_figure(8, 4.6)
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    number = summary["series"].nunique()
    is_points = number > style.MOST_LINES // 2 or (number > 1 and not style.has_order(summary))
    if is_points:
        _draw_direct_points(axes, summary)
    else:
        for name, rows, look, x in style.each_series(summary):
            prefix = f"{name}: " * bool(name)
            style.draw_series(axes, x, rows, WHOLE, label=f"{prefix}whole effect", **look)
            dotted = look | {"linestyle": ":", "markerfacecolor": "white"}
            style.draw_series(axes, x + style.APART, rows, DIRECT, label=f"{prefix}direct effect", **dotted)
        label_axes(axes, summary, "change of the log odds of the true class (nats)")
    layout.add_legend_below(figure, [axes], 2)
    what = "direct: carried straight to the readout, last layer norm's scale frozen"
    layout.set_headline(figure, caption.title, what, caption.sample + f"; {caption.intervals}" * (not is_points))
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
