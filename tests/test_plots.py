"""Figures: the right panels, curves and labels come out, and nothing in the table is changed."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dit_lens import plots


@pytest.fixture
def curves() -> pd.DataFrame:
    index = pd.MultiIndex.from_product(
        [["right", "cosine"], ["maze", "circle"], ["x0-hat", "control"], [1.0, 0.5, 0.1]],
        names=["measure", "task", "series", "sigma"],
    )
    table = pd.DataFrame({"mean": 0.5, "low": 0.4, "high": 0.6, "clusters": 4}, index=index).reset_index()
    return table.drop(table[(table["measure"] == "right") & (table["task"] == "circle")].index)


def drawn(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()
    return figure


def image(axis: Axes) -> np.ndarray:
    """The numbers of the axis's only image."""
    (found,) = axis.get_images()
    return np.asarray(found.get_array())


def grid(table: pd.DataFrame, **changes: Any) -> Figure:
    how: Any = {"x": "sigma", "x_label": "sigma", "row": "measure", "column": "task", "series": "series", **changes}
    return plots.curve_grid(table, row_labels={"right": "share right", "cosine": "cosine"}, controls=["control"], **how)


def test_curve_grid_has_a_panel_per_row_and_column(curves: pd.DataFrame) -> None:
    before = curves.copy()
    figure = drawn(grid(curves, noise_axis=True))
    assert len(figure.axes) == 4
    assert [axis.get_title() for axis in figure.axes[:2]] == ["maze", "circle"]
    assert [figure.axes[i].get_ylabel() for i in (0, 2)] == ["share right", "cosine"]
    assert figure.axes[0].get_xlim()[0] > figure.axes[0].get_xlim()[1]
    pd.testing.assert_frame_equal(curves, before)


def test_panels_say_how_many_samples_and_when_there_is_nothing(curves: pd.DataFrame) -> None:
    texts = [[text.get_text() for text in axis.texts] for axis in drawn(grid(curves)).axes]
    assert texts[0] == ["N = 4"]
    assert "nothing" in texts[1][0]
    some = curves.assign(clusters=[4, 6] * (len(curves) // 2))
    assert drawn(grid(some)).axes[0].texts[0].get_text() == "N = 4-6"


def test_controls_are_grey_and_dashed_and_levels_span_the_axis(curves: pd.DataFrame) -> None:
    level = pd.DataFrame(
        {"measure": "cosine", "task": "maze", "series": "floor", "mean": 0.2, "low": 0.1, "high": 0.3}, index=[0]
    )
    figure = drawn(grid(curves, levels=level.assign(clusters=4)))
    lines = {line.get_label(): line for line in figure.axes[2].get_lines()}
    assert lines["x0-hat"].get_linestyle() == "-"
    assert lines["control"].get_linestyle() != "-"
    assert sorted(np.asarray(lines["floor"].get_xdata())) == [0.1, 1.0]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"x0-hat", "control", "floor"}


def test_a_single_point_of_a_control_can_be_seen(curves: pd.DataFrame) -> None:
    few = curves[(curves["series"] == "x0-hat") | (curves["sigma"] == 0.5)]
    axis = drawn(grid(few)).axes[0]
    (bar,) = axis.containers
    point, _, (line,) = bar  # pyright: ignore[reportGeneralTypeIssues]
    assert point.get_marker() == "s"
    assert [[float(y) for _, y in ends] for ends in line.get_segments()] == [[0.4, 0.6]]


def test_a_dashed_series_has_the_colour_of_its_partner() -> None:
    ends = {"mean": 1.0, "low": 0.9, "high": 1.1, "clusters": 2, "r": "r", "c": "c"}
    table = pd.DataFrame([{**ends, "x": x, "s": name} for name in ("noise", "null", "twin") for x in (0, 1)])
    dashed = {"null": "noise", "twin": "twin"}
    figure = plots.curve_grid(table, x="x", x_label="x", row="r", column="c", series="s", row_labels={"r": "v"}, dashed=dashed)
    noise, null, twin = drawn(figure).axes[0].get_lines()
    assert null.get_color() == noise.get_color() != twin.get_color()
    assert [line.get_linestyle() for line in (noise, null, twin)] == ["-", "--", "--"]


def test_whole_number_axes_have_whole_number_ticks() -> None:
    table = pd.DataFrame({"block": [0, 1, 2], "mean": 1.0, "low": 0.9, "high": 1.1, "clusters": 2, "r": "r", "c": "c", "s": "s"})
    figure = plots.curve_grid(table, x="block", x_label="block", row="r", column="c", series="s", row_labels={"r": "value"})
    drawn(figure)
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


def test_a_heat_grid_places_every_cell_and_leaves_gaps() -> None:
    index = pd.MultiIndex.from_product(
        [["trained", "untrained"], ["wall", "route"], ["0", "1", "place"], [3, 0]], names=["model", "target", "y", "step"]
    )
    table = pd.DataFrame({"score": np.arange(24.0)}, index=index).reset_index()
    before = table.copy()
    figure = plots.heat_grid(
        table,
        row="model",
        column="target",
        x="step",
        y="y",
        value="score",
        x_label="step",
        row_labels={"untrained": "untrained\nblock", "trained": "trained\nblock"},
        value_labels=dict.fromkeys(["trained", "untrained"], "AUC"),
        y_order=["place", "", "0", "1"],
        limits={"trained": (0, 1), "untrained": (0, 30)},
        titles={"wall": "wall, N = 3"},
    )
    panels = drawn(figure).axes[:4]
    assert [axis.get_title() for axis in panels] == ["wall, N = 3", "route", "", ""]
    assert [panels[place].get_ylabel() for place in (0, 2)] == ["untrained\nblock", "trained\nblock"]
    found = image(panels[3])  # trained, route; steps in order of appearance
    assert np.isnan(found[1].astype(float)).all()
    assert found[[0, 2, 3]].tolist() == [[10, 11], [6, 7], [8, 9]]
    assert [label.get_text() for label in panels[3].get_xticklabels()] == ["3", "0"]
    assert panels[0].get_images()[0].get_clim() == (0, 30)
    pd.testing.assert_frame_equal(table, before)


def test_heat_maps_place_every_cell() -> None:
    table = pd.DataFrame(
        [(t, s, b, 0.5 + 0.1 * b) for t in ("wall", "route") for s in ("0", "5") for b in range(3)],
        columns=["target", "step", "block", "auc"],
    )
    figure = plots.heat_maps(
        table, panel="target", x="step", y="block", value="auc", x_label="step", y_label="block", value_label="AUC",
        limits=(0.5, 1.0), titles={"wall": "wall\nplace only: 0.60"}, spread="auc", spread_limits=(0.5, 0.9),
    )  # fmt: skip
    drawn(figure)
    assert image(figure.axes[0]).shape == (3, 2)
    assert np.allclose(image(figure.axes[0])[2], 0.7)
    assert figure.axes[0].get_title() == "wall\nplace only: 0.60"
    assert {text.get_text() for text in figure.axes[1].texts} == {".50", ".60", ".70"}
    assert [axis.get_images()[0].get_clim() for axis in figure.axes[::2][:2]] == [(0.5, 1.0), (0.5, 0.9)]


def test_film_shows_each_picture_in_its_place() -> None:
    pictures = np.zeros((2, 3, 16, 16, 3), dtype=np.uint8)
    pictures[1, 2] = 200
    figure = plots.film(pictures, ["step 0", "step 1"], ["a", "b", "c"], title="a title")
    drawn(figure)
    sheet = image(figure.axes[0])
    assert sheet.shape == (33, 50, 3)
    assert (sheet[-16:, -16:] == 200).all()
    assert (sheet[:16, :16] == 0).all()
    assert (sheet[16] == 255).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["step 0", "step 1"]


def test_token_maps_have_one_map_per_row_and_column() -> None:
    index = pd.MultiIndex.from_product([range(2), range(3), range(4), range(4)], names=["block", "frame", "y", "x"])
    table = pd.DataFrame({"norm": np.arange(96.0)}, index=index).reset_index()
    figure = plots.token_maps(
        table, row="block", column="frame", value="norm", value_label="L2 norm",
        pictures=np.zeros((3, 16, 16, 3), dtype=np.uint8), picture_label="video",
    )  # fmt: skip
    drawn(figure)
    sheet = image(figure.axes[0])
    assert sheet.shape == (3 * 64 + 2 * 4, 3 * 64 + 2 * 4, 3)
    assert (sheet[:64, :64] == 0).all()
    assert sheet[68, 0].sum() < 50 < 500 < sheet[-1, -1].sum()  # the smallest norm is dark, the largest bright
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["video", "block 0", "block 1"]
