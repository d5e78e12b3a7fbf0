"""The HTML page of a report, with each figure drawn for a wide and for a narrow screen."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from hf_disparse.report.figures import Figure
from hf_disparse.report.theme import UNIT, css_variables, inline_svg, save, styled, svg

FIGURES_NAME = "figures"
WIDE, NARROW = 880, 356  # width of a figure in CSS pixels, on a page of 960 and of 390
_LEGEND_LINE = 19


def write_page(path: Path, title: str, facts: Mapping[str, str], figures: Sequence[Figure], data: str) -> None:
    """Writes the page, and its figures as files into the folder `figures` beside it.

    Args:
        facts: name -> text, shown below the title.
        data: name of the file that holds all numbers.
    """
    folder = path.parent / FIGURES_NAME
    folder.mkdir(parents=True, exist_ok=True)
    shown = [(figure, _drawings(figure, folder), _table(figure)) for figure in figures]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("hf_disparse.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        title=title,
        facts=facts,
        shown=shown,
        data=data,
        light=Markup(css_variables(dark=False)),
        dark=Markup(css_variables(dark=True)),
    )
    path.write_text(page, encoding="utf-8")


def draw(figure: Figure, width: int) -> Drawing:
    """Draws the figure's panels, side by side where they fit, with one legend for all.

    Args:
        width: in CSS pixels; below `WIDE`, panels are stacked.
    """
    across = 1 if width < WIDE else min(len(figure.panels), figure.across)
    down = math.ceil(len(figure.panels) / across)
    drawing = Drawing(figsize=(width / UNIT, figure.height * down / UNIT), dpi=UNIT, layout="constrained")
    drawing.get_layout_engine().set(h_pad=0.09, w_pad=0.06)
    axes = list(drawing.subplots(down, across, squeeze=False).flat)
    for ax in axes[len(figure.panels) :]:
        ax.remove()
    labels: dict[str, Any] = {}
    for (title, plot), ax in zip(figure.panels, axes, strict=False):
        plot(ax)
        if title:
            ax.set_title(title)
        if legend := ax.get_legend():
            handles, names = ax.get_legend_handles_labels()
            if not handles:
                handles, names = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
            labels |= dict(zip(names, handles, strict=True))
            legend.remove()
    if labels:
        columns = max(1, min(len(labels), int(width / (6.5 * max(map(len, labels)) + 45))))
        lines = math.ceil(len(labels) / columns)
        drawing.set_figheight((figure.height * down + _LEGEND_LINE * lines + 8) / UNIT)
        drawing.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=columns)
    return drawing


def _drawings(figure: Figure, folder: Path) -> dict[str, Markup]:
    """ "wide" and "narrow" -> SVG for the page; writes the wide drawing as files, too."""
    if not figure.panels:
        return {}
    drawn = {}
    label = f"{figure.title}. {figure.sentence}"
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        drawing = styled(lambda width=width: draw(figure, width))
        drawing.set_layout_engine("none")  # it is laid out; saving would repeat that for each file
        file = svg(drawing)
        drawn[kind] = Markup(inline_svg(file, f"{figure.name}-{kind}-", label))
        if kind == "wide":
            (folder / f"{figure.name}.svg").write_bytes(file)
            save(drawing, folder / f"{figure.name}.png", dpi=2 * UNIT, metadata={"Software": None})
    return drawn


def _table(figure: Figure) -> list[list[tuple[str, bool]]]:
    """Rows of cells, each (text, whether it is a number)."""
    return [[_cell(value, figure.digits) for value in row] for row in figure.rows]


def _cell(value: Any, digits: int) -> tuple[str, bool]:
    """A value as (text, whether it is a number)."""
    if value is None or value != value:
        return "\N{EN DASH}", True
    if isinstance(value, float):
        return f"{value:.{digits}f}", True
    if isinstance(value, int):
        return f"{value:,}", True
    return str(value), False
