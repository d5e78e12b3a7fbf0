"""Plots show the numbers they were given as lines, bars, cells and labels, in colours that readers can tell apart."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pip install 'hf_disparse[plot]'")

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from hf_disparse.report import plots, theme
from tests.helpers.analyses import analysis, comparison, footprint

THREE = analysis(["a", "b", "c"], layers=4, stages=("sparse",))["stages"][0]


def axes() -> Axes:
    return Figure(figsize=(6, 4)).add_subplot()


def lines(ax: Axes) -> dict:
    return {line.get_label(): line for line in ax.get_lines()}


def whole(stage: dict, tasks: list, key: str = "beyond_chance") -> list:
    return [row[key] for row in stage["agreement"] if row["kind"] == "all" and row["tasks"] == tasks]


def test_agreement_has_a_line_per_pair_and_one_of_all_with_its_interval():
    ax = axes()
    assert plots.plot_agreement(THREE["agreement"], ax, watershed=THREE["watershed"]) is ax
    drawn = lines(ax)
    assert set(drawn) == {"chance", "a + b", "a + c", "b + c", "all 3 tasks at once", "watershed"}
    for label, tasks in (("a + b", ["a", "b"]), ("b + c", ["b", "c"]), ("all 3 tasks at once", ["a", "b", "c"])):
        assert list(drawn[label].get_xdata()) == [0, 1, 2, 3]
        assert list(drawn[label].get_ydata()) == whole(THREE, tasks)
    assert set(drawn["chance"].get_ydata()) == {0} and set(drawn["watershed"].get_xdata()) == {2}
    bands = [set(np.round(band.get_paths()[0].vertices[:, 1], 9)) for band in ax.collections]
    ends = [{round(v, 9) for key in ("low", "high") for v in whole(THREE, ["a", "b", "c"], key)}]
    assert ends[0] in bands and len(bands) == 4


def test_with_many_pairs_only_the_extremes_have_names_and_with_more_than_twelve_tasks_no_others_are_drawn():
    for count, grey in ((5, 8), (12, 64), (14, 0)):
        tasks = [f"t{i}" for i in range(count)]
        rows = [
            {
                "layer": 0,
                "kind": "all",
                "tasks": list(group),
                "iou": 0,
                "chance": 0,
                "beyond_chance": value,
                "low": None,
                "high": None,
            }
            for group, value in [
                *(((a, b), 0.5 + 0.001 * (i + j)) for i, a in enumerate(tasks) for j, b in enumerate(tasks) if i < j),
                (tuple(tasks), 0.4),
            ]
        ]
        ax = plots.plot_agreement(rows, axes())
        named = {label for label in lines(ax) if "+" in label}
        assert named == {"t0 + t1", f"t{count - 2} + t{count - 1}"}
        assert sum(to_hex(line.get_color()) == theme.BAND for line in ax.get_lines()) == grey


@pytest.mark.parametrize("function", ["plot_agreement", "plot_agreement_by_kind"])
def test_one_task_gets_a_sentence_instead_of_an_empty_figure(function):
    ax = getattr(plots, function)([], axes())
    assert "one task" in ax.texts[0].get_text() and not ax.get_lines() and not ax.axison
    assert "one task" in plots.plot_affinity([[1.0]], ["a"], axes()).texts[0].get_text()


def test_the_heat_map_has_layers_down_and_kinds_across():
    ax = plots.plot_agreement_by_kind(THREE["agreement"], axes())
    cells = ax.collections[0].get_array()
    kinds = [label.get_text() for label in ax.get_xticklabels()]
    assert cells.shape == (4, 6) and kinds == ["query", "key", "value", "output", "up", "down"]
    for row in THREE["agreement"]:
        if row["kind"] != "all" and len(row["tasks"]) == 3:
            assert cells[row["layer"], kinds.index(row["kind"])] == row["beyond_chance"]
    assert ax.yaxis_inverted() and {text.get_text() for text in ax.texts} == {f"{v:.2f}" for v in cells.flat}


def test_affinity_shows_pairs_and_no_diagonal_on_the_scale_that_it_is_given():
    matrix = [[1.0, 0.25, -0.5], [0.25, 1.0, 0.125], [-0.5, 0.125, 1.0]]
    ax = plots.plot_affinity(matrix, ["a", "b", "c"], axes(), limit=0.8, diverging=True)
    mesh = ax.collections[0]
    shown = np.ma.filled(mesh.get_array().astype(float), np.nan)
    assert np.isnan(np.diag(shown)).all() and shown[0, 2] == -0.5 and shown[1, 2] == shown[2, 1] == 0.125
    assert mesh.get_clim() == (-0.8, 0.8)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]


def test_bars_of_keepers_are_stacked_and_end_at_one():
    shares = [[0.4, 0.3, 0.2, 0.1], [0.7, 0.2, 0.1, 0.0]]
    ax = plots.plot_keepers([0, 1], shares, axes())
    assert [c.get_label() for c in ax.containers] == ["no task", "1 task", "2 tasks", "all 3 tasks"]
    for i, bars in enumerate(ax.containers):
        assert [bar.get_height() for bar in bars] == pytest.approx([share[i] for share in shares])
        assert [bar.get_y() for bar in bars] == pytest.approx([sum(share[:i]) for share in shares])


@pytest.mark.parametrize("tasks", [1, 2, 7, 8, 12, 200])
def test_ranges_of_many_tasks_lose_no_task(tasks):
    share = np.arange(1.0, tasks + 2) / sum(range(1, tasks + 2))
    ax = plots.plot_keepers([0], [share.tolist()], axes())
    heights = {bars.get_label(): bars[0].get_height() for bars in ax.containers}
    assert sum(heights.values()) == pytest.approx(1) and len(heights) <= 8
    assert heights["no task"] == share[0] and [*heights.values()][-1] == pytest.approx(share[-1])


def test_a_head_is_coloured_by_who_else_keeps_it():
    parts = [
        {"layer": 1, "granularity": "head", "heads": [["b"], ["a", "b", "c"]]},
        {"layer": 0, "granularity": "head", "heads": [[], ["a", "c"]]},
        {"layer": 0, "granularity": "neuron"},
    ]
    ax = plots.plot_heads(parts, ["a", "b", "c"], axes())
    cells = np.ma.filled(ax.collections[0].get_array().astype(float), 0)
    assert cells.tolist() == [[0, 0, 0], [2, 0, 2], [0, 1, 0], [3, 3, 3]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]
    assert list(ax.get_yticks()) == [0.5, 2.5]


def test_the_cost_curve_is_dashed_one_shot_and_solid_recovered_with_a_ring_at_the_knee():
    points = [
        {
            "sparsity": s,
            "recovered": r,
            "metrics": {"a": 90 - 20 * s + r, "b": 80 - 40 * s + r},
            "average": 85 - 30 * s + r,
        }
        for r in (True, False)
        for s in (0.9, 0.5)
    ]
    curve = {"denominator": "prunable weights", "points": points, "knee": {"a": 0.5, "b": None, "average": 0.9}}
    ax = plots.plot_cost_curve(curve, axes())
    drawn = lines(ax)
    assert drawn["a, one-shot"].get_linestyle() == "--" and drawn["a, recovered"].get_linestyle() == "-"
    for label, values in (("a, one-shot", [80, 72]), ("a, recovered", [81, 73]), ("average, recovered", [71, 59])):
        assert list(drawn[label].get_xdata()) == [0.5, 0.9] and list(drawn[label].get_ydata()) == pytest.approx(values)
    rings = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines() if line.get_label() == "_knee"}
    assert rings == {(0.5, 81), (0.9, 59)}


@pytest.mark.parametrize("quantity", plots.FOOTPRINT)
def test_the_footprint_has_a_bar_before_and_one_after_and_sums_what_it_leaves_out(quantity):
    before, after = plots.FOOTPRINT[quantity]
    for layers, bars in ((2, 3), (40, 20)):
        rows = footprint(layers)
        ax = plots.plot_footprint(rows, axes(), quantity)
        for container, key in zip(ax.containers, (before, after), strict=True):
            widths = [bar.get_width() for bar in container]
            assert len(widths) == bars and sum(widths) == sum(row[key] for row in rows)
        labels = [label.get_text() for label in ax.get_yticklabels()]
        assert labels[1] == "layer 0" if layers == 2 else labels[-1] == "22 others"


def test_a_comparison_has_a_line_per_method_and_its_spread():
    report = comparison(["magnitude", "unanimous"], (0.9, 0.5))
    ax = plots.plot_comparison(report["rows"], axes())
    assert set(lines(ax)["dense"].get_ydata()) == {90}
    names = [container.get_label() for container in ax.containers]
    assert names == ["magnitude disparse", "unanimous disparse"]
    for i, container in enumerate(ax.containers):
        points, _, (bars,) = container.lines
        assert list(points.get_ydata()) == pytest.approx([89 - i - 1.25, 89 - i - 7.29])
        assert [s[1, 1] - s[0, 1] for s in bars.get_segments()] == pytest.approx([1.2, 1.2])
        assert list(points.get_xdata()) == pytest.approx([0.5, 0.9], abs=0.1)  # side by side
    assert list(ax.get_xticks()) == [0.5, 0.9]


def test_one_sparsity_one_seed_and_no_dense_row_are_drawn_too():
    rows = comparison(["joint"], (0.8,), seeds=(1,))["rows"][1:]
    (container,) = plots.plot_comparison(rows, axes()).containers
    assert list(container.lines[0].get_xdata()) == pytest.approx([0.8])


HOSTILE = ["$x_1$", "_hidden", "a\nb\x00", r"$\frac{", "<script>", "x" * 300]


def test_names_are_drawn_literally():
    ax = plots.plot_affinity(np.eye(6).tolist(), HOSTILE, axes())
    stage = analysis(HOSTILE, layers=2, stages=("dense",))
    plots.plot_cost_curve(stage["curve"], curve := axes())
    for figure in (ax.figure, curve.figure):
        figure.draw_without_rendering()  # would parse a name as mathematics
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[0] == r"\$x_1\$" and labels[4] == "<script>" and len(labels[5]) <= 16 and "\n" not in labels[2]
    assert (
        len(curve.get_legend().get_texts()) == 2 * 7
    )  # none is hidden: six tasks and the average, one-shot and recovered


def test_two_hundred_tasks_are_drawn():
    tasks = [f"task {i}" for i in range(200)]
    matrix = (np.ones((200, 200)) * 0.5).tolist()
    ax = plots.plot_affinity(matrix, tasks, axes())
    assert ax.collections[0].get_array().shape == (200, 200) and ax.get_xlabel() == "task"
    parts = [{"layer": 0, "granularity": "head", "heads": [tasks, tasks[:1], []]}]
    assert plots.plot_heads(parts, tasks, axes()).collections[0].get_array().shape == (3, 200)


# Colours


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_lines_and_text_contrast_with_the_page(dark):
    def shade(colour: str) -> str:
        return theme.DARK[colour] if dark else colour

    assert all(contrast(shade(colour), shade(theme.PAPER)) >= 3 for colour in theme.COLOURS)
    assert all(
        contrast(shade(colour), shade(theme.PAPER)) >= 4.5 for colour in (theme.INK, theme.MUTED, theme.COLOURS[0])
    )


# Viénot, Brettel and Mollon 1999, on linear RGB: what a reader without long-wave or middle-wave cones sees.
BLIND = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB, white D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("sight", ["full", *BLIND])
def test_colours_differ_in_every_reader_s_eyes_and_have_markers_of_their_own(sight, dark):
    seen = []
    for colour in theme.COLOURS:
        shade = to_rgb(theme.DARK[colour] if dark else colour)
        linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shade])
        seen.append(lab(np.clip(np.array(BLIND.get(sight, np.eye(3))) @ linear, 0, 1)))
    assert (
        min(math.dist(a, b) for i, a in enumerate(seen) for b in seen[:i]) > 20
    )  # a difference of 2 to 3 is just noticeable
    assert len(set(theme.MARKERS)) == len(theme.COLOURS)
