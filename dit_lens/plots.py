"""Figures. Each function takes a table (or pictures) and returns a matplotlib Figure; it computes nothing.

One look throughout: curves with shaded 95 % intervals, the measured thing in a strong colour, controls grey and dashed,
colours that colour-blind readers can tell apart (Okabe and Ito), the number of samples beside every panel. Against sigma
the axis runs from 1 (noise) on the left to 0 (clean) on the right, the way a video is made.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREYS = (
    ("#444444", (0, (4, 2))),
    ("#808080", (0, (1, 1))),
    ("#777777", (0, (6, 1.5, 1, 1.5))),
    ("#aaaaaa", (0, (8, 2))),
)
FEW = 0.05
"""Share of a panel's largest number of samples below which a point is not drawn: one run of a hundred is no curve."""
LOOK: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def curve_grid(
    table: pd.DataFrame,
    *,
    x: str,
    x_label: str,
    row: str,
    column: str,
    series: str,
    row_labels: Mapping[Any, str],
    controls: Collection[str] = (),
    dashed: Mapping[str, str] | None = None,
    limits: Mapping[Any, tuple[float, float]] | None = None,
    lines_at: Mapping[Any, float] | None = None,
    levels: pd.DataFrame | None = None,
    noise_axis: bool = False,
) -> Figure:
    """Small multiples of curves with intervals: one panel per value of ``row`` and ``column``, one curve per ``series``.

    ``table`` has those columns, ``x``, and ``mean``, ``low``, ``high``, ``clusters`` as `dit_lens.statistics.summarise`
    makes them. ``row_labels`` names the y axes and fixes the order of the rows; ``controls`` are the series drawn grey;
    ``dashed`` those drawn in dashes, each in the colour of the series before it that it is mapped to, or of its own where that
    is itself: a curve shows its null, or the one that it lies on. ``lines_at`` draws a thin level line per row (chance).
    ``levels`` is a table like ``table`` without ``x``: what does not depend on x, drawn across as a control. ``noise_axis``
    turns x round, for sigma. Points of very `FEW` samples are left out.
    """
    columns, names = list(dict.fromkeys(table[column])), list(dict.fromkeys(table[series]))
    if levels is not None:
        # A level is a curve with two points, the ends of the x axis.
        ends = pd.DataFrame({x: [table[x].min(), table[x].max()]})
        levels = levels[levels[column].isin(columns)].drop(columns=x, errors="ignore").merge(ends, how="cross")
        table, controls = pd.concat([table, levels]), [*controls, *levels[series].unique()]
        names = list(dict.fromkeys(table[series]))
    looks = _looks(names, controls, dashed or {})
    with mpl.rc_context(LOOK):
        size = (max(4.2, 1.1 + 2.25 * len(columns)), 0.9 + 1.85 * len(row_labels))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(row_labels), len(columns), sharex=True, sharey="row", squeeze=False)
        for line, (value, label) in zip(axes, row_labels.items(), strict=True):
            line[0].set_ylabel(label)
            for axis, panel in zip(line, columns, strict=True):
                here = table[(table[row] == value) & (table[column] == panel)]
                here = here[here["clusters"] >= FEW * here["clusters"].max()]
                for name in names:
                    _curve(axis, here[here[series] == name].sort_values(x), x, looks[name], name)
                if lines_at and value in lines_at:
                    axis.axhline(lines_at[value], color="#888888", linewidth=0.7, zorder=0)
                if limits and value in limits:
                    axis.set_ylim(*limits[value])
                if here["mean"].isna().all():
                    axis.text(
                        0.5,
                        0.5,
                        "nothing to\nmeasure here",
                        ha="center",
                        va="center",
                        transform=axis.transAxes,
                        color="#999999",
                        fontsize=8,
                    )
                else:
                    _count(axis, here["clusters"])
        for axis, panel in zip(axes[0], columns, strict=True):
            axis.set_title(str(panel), pad=12)  # above the number of samples
        if noise_axis:
            axes[0, 0].set_xlim(1.03, -0.03)
        elif pd.api.types.is_integer_dtype(table[x]):
            axes[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.supxlabel(x_label, fontsize=9)
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if len(names) > 1:
            ordered = [name for name in names if name in handles]
            figure.legend(
                [handles[name] for name in ordered],
                ordered,
                loc="outside upper center",
                ncols=min(len(ordered), 4),
            )
    return figure


def heat_maps(
    table: pd.DataFrame,
    *,
    panel: str,
    x: str,
    y: str,
    value: str,
    x_label: str,
    y_label: str,
    value_label: str,
    limits: tuple[float, float],
    titles: Mapping[Any, str] | None = None,
    spread: str | None = None,
    spread_label: str = "",
    spread_limits: tuple[float, float] | None = None,
) -> Figure:
    """One heat map per value of ``panel``, ``y`` upwards and ``x`` to the right in order of appearance, on one colour
    scale.

    Cells carry their number where there are few enough to read. ``titles`` may say more than the panel's name. ``spread``
    is a column that says how uncertain the values are; it has a second row of maps, on a scale as long as that of the values
    unless ``spread_limits`` are its ends.
    """
    panels, columns = list(dict.fromkeys(table[panel])), list(dict.fromkeys(table[x]))
    rows = sorted(table[y].unique())
    maps = [(value, value_label, limits, "cividis")]
    if spread is not None:
        # On a scale as long as that of the values, so that what is dark is uncertain beside them.
        longest = np.nanmax([limits[1] - limits[0], table[spread].max()])
        maps.append((spread, spread_label, spread_limits or (0.0, float(longest) or 1.0), "Greys"))
    with mpl.rc_context({**LOOK, "axes.grid": False}):
        wide = 1.2 + 0.46 * len(columns)
        size = (1.0 + wide * len(panels), 0.6 + (0.9 + 0.27 * len(rows)) * len(maps))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(maps), len(panels), sharex=True, sharey=True, squeeze=False)
        for line, (shown, label, ends, colours) in zip(axes, maps, strict=True):
            image = None
            for axis, name in zip(line, panels, strict=True):
                grid = table[table[panel] == name].pivot(index=y, columns=x, values=shown).reindex(rows)[columns]
                image = axis.imshow(grid, origin="lower", aspect="auto", cmap=colours, vmin=ends[0], vmax=ends[1])
                axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if len(columns) > 6 else 0)
                axis.set_yticks(range(len(rows)), rows, fontsize=7)
                if len(columns) <= 12 and len(rows) <= 40:
                    _numbers(axis, grid.to_numpy(), ends, dark_is_high=colours == "Greys")
            line[0].set_ylabel(y_label)
            if image is not None:
                figure.colorbar(image, ax=list(line), label=label, shrink=0.9, pad=0.01)
        for axis, name in zip(axes[0], panels, strict=True):
            axis.set_title((titles or {}).get(name, str(name)))
        figure.supxlabel(x_label, fontsize=9)
    return figure


def heat_grid(
    table: pd.DataFrame,
    *,
    row: str,
    column: str,
    x: str,
    y: str,
    value: str,
    x_label: str,
    row_labels: Mapping[Any, str],
    value_labels: Mapping[Any, str],
    y_order: Sequence[str],
    limits: Mapping[Any, tuple[float, float]],
    titles: Mapping[Any, str] | None = None,
) -> Figure:
    """Small heat maps: one panel per value of ``row`` and ``column``, with one colour scale for each row.

    ``row_labels`` names the y axes and fixes the order of the rows; ``value_labels`` names their colours, and ``limits`` are the
    ends of their scales. ``y_order`` are the values of ``y`` from below; one that the table lacks leaves a gap. ``x`` runs to
    the right in order of appearance.
    """
    columns, places = list(dict.fromkeys(table[column])), list(dict.fromkeys(table[x]))
    with mpl.rc_context({**LOOK, "axes.grid": False}):
        wide, high = max(0.9, 0.17 * len(places)), max(1.6, 0.15 * len(y_order))
        size = (2.3 + (wide + 0.15) * len(columns), 1.2 + (high + 0.15) * len(row_labels))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(row_labels), len(columns), sharex=True, sharey=True, squeeze=False)
        for line, (name, label) in zip(axes, row_labels.items(), strict=True):
            image = None
            for axis, panel in zip(line, columns, strict=True):
                here = table[(table[row] == name) & (table[column] == panel)]
                grid = here.pivot(index=y, columns=x, values=value).reindex(list(y_order))[places].astype(float)
                low, high = limits[name]
                image = axis.imshow(grid, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=high)
                axis.set_xticks(range(len(places)), places, fontsize=6, rotation=90)
                axis.set_yticks(range(len(y_order)), y_order, fontsize=6)
                axis.tick_params(length=1.5)
                if len(places) <= 4:
                    _numbers(axis, grid.to_numpy(), limits[name])
            line[0].set_ylabel(label, fontsize=8)
            if image is not None:
                figure.colorbar(image, ax=list(line), label=value_labels[name], shrink=0.9, pad=0.01)
        for axis, panel in zip(axes[0], columns, strict=True):
            axis.set_title((titles or {}).get(panel, str(panel)), fontsize=8)
        figure.supxlabel(x_label, fontsize=9)
    return figure


def film(
    pictures: UInt8[np.ndarray, "rows columns height width 3"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Figure:
    """Pictures in rows and columns with labels, pixels sharp."""
    with mpl.rc_context(LOOK):
        figure = _sheet_figure(pictures.shape)
        _sheet(figure.subplots(), pictures, row_labels, column_labels)
        if title:
            figure.axes[0].set_title(title, fontsize=9, loc="left")
    return figure


def token_maps(
    table: pd.DataFrame,
    *,
    row: str,
    column: str,
    value: str,
    value_label: str,
    pictures: UInt8[np.ndarray, "columns height width 3"],
    picture_label: str,
) -> Figure:
    """Maps of tokens in a grid: one map per ``row`` (downwards) and ``column``, on one colour scale.

    ``table`` has those columns, the token's place ``y`` and ``x``, and ``value``. The scale spans the 1st to the 99th
    percentile, so that a few very large tokens do not darken all the others. ``pictures`` stand above the maps, one per
    column, to show what is where.
    """
    index = [row, column, "y", "x"]
    names = [sorted(table[axis].unique()) for axis in index]
    maps = table.set_index(index)[value].reindex(pd.MultiIndex.from_product(names)).to_numpy()
    maps = maps.reshape([len(axis) for axis in names])
    # Tokens several pixels wide, and the pictures in as many pixels as the maps have.
    enlarged = max(1, round(64 / maps.shape[-1]))
    maps = maps.repeat(enlarged, axis=2).repeat(enlarged, axis=3)
    nearest = [np.arange(size) * side // size for size, side in zip(maps.shape[2:], pictures.shape[1:3], strict=True)]
    pictures = pictures[:, nearest[0]][:, :, nearest[1]]
    low, high = np.quantile(table[value], [0.01, 0.99]).tolist()
    colours = ScalarMappable(Normalize(low, high), "magma")
    coloured = (colours.to_rgba(maps.reshape(-1, maps.shape[-1]))[..., :3] * 255).astype(np.uint8).reshape(*maps.shape, 3)
    sheet = np.concatenate([pictures[None], coloured])
    with mpl.rc_context(LOOK):
        figure = _sheet_figure(sheet.shape)
        axis = figure.subplots()
        labels = [[f"{axis} {name}" for name in found] for axis, found in zip(index[:2], names[:2], strict=True)]
        _sheet(axis, sheet, [picture_label, *labels[0]], labels[1])
        figure.colorbar(colours, ax=axis, label=value_label, shrink=0.4, aspect=30, pad=0.02)
    return figure


def _sheet_figure(shape: tuple[int, ...]) -> Figure:
    rows, columns, height, width = shape[:4]
    wide = 0.78
    return Figure(figsize=(1.6 + wide * columns, 0.7 + wide * height / width * rows), layout="constrained")


def _sheet(
    axis: Axes,
    pictures: UInt8[np.ndarray, "rows columns height width 3"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
) -> None:
    """All pictures as one image with gaps between them: hundreds of axes would take minutes to draw."""
    rows, columns, height, width, _ = pictures.shape
    gap = max(1, round(width / 16))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for line, place in np.ndindex(rows, columns):
        top, left = line * (height + gap), place * (width + gap)
        sheet[top : top + height, left : left + width] = pictures[line, place]
    axis.imshow(sheet, interpolation="nearest")
    axis.grid(False)
    axis.set_yticks(np.arange(rows) * (height + gap) + height / 2, row_labels, fontsize=7.5)
    axis.set_xticks(np.arange(columns) * (width + gap) + width / 2, column_labels, fontsize=7.5)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _looks(names: Sequence[str], controls: Collection[str], dashed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each series: strong colours for what is measured, dashed greys for controls."""
    strong, grey = iter(COLOURS), iter(GREYS * 3)
    looks = {}
    for name in names:
        if name in controls:
            colour, dash = next(grey)
            looks[name] = {"color": colour, "linestyle": dash, "linewidth": 1.2}
        elif dashed.get(name, name) == name:
            looks[name] = {"color": next(strong), "linewidth": 1.6, "marker": "o", "markersize": 2.6}
        if name in dashed:
            looks[name] = {**looks[dashed[name]], "linestyle": (0, (2, 2)), "marker": ""}
    return looks


def _curve(axis: Axes, points: pd.DataFrame, x: str, look: dict[str, Any], label: str) -> None:
    if points.empty:
        return
    if len(points) == 1:  # neither a line nor a shade would be seen
        ends = [(points["mean"] - points["low"]).clip(0), (points["high"] - points["mean"]).clip(0)]
        axis.errorbar(points[x], points["mean"], yerr=ends, label=label, **{"marker": "s", "markersize": 3.2, **look})
        return
    axis.plot(points[x], points["mean"], label=label, **look)
    axis.fill_between(points[x], points["low"], points["high"], color=look["color"], alpha=0.16, linewidth=0)


def _count(axis: Axes, clusters: pd.Series) -> None:
    """How many samples stand behind a panel, above its corner, where no curve is."""
    low, high = clusters.min(), clusters.max()
    text = f"N = {high}" if low == high else f"N = {low}-{high}"
    axis.text(1.0, 1.01, text, ha="right", va="bottom", transform=axis.transAxes, fontsize=7, color="#666666")


def _numbers(axis: Axes, grid: np.ndarray, limits: tuple[float, float], dark_is_high: bool = False) -> None:
    middle = sum(limits) / 2
    for (line, place), number in np.ndenumerate(grid):
        if np.isfinite(number):
            colour = "white" if (number < middle) != dark_is_high else "black"
            text = f"{number:.3g}" if abs(number) >= 10 else f"{number:.2f}"
            text = text.replace("0.", ".", 1).replace("-.00", ".00") if abs(number) < 1 else text
            axis.text(place, line, text, ha="center", va="center", fontsize=6, color=colour)
