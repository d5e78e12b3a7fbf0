"""The figures' colours, light and dark, and figures as SVG within a page.

A figure is drawn once, in light colours. In a page's SVG each colour becomes a CSS variable, which the page sets for
light and for dark.
"""

import io
import re
import warnings
from collections.abc import Callable
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER, BAND = "#1b1c1e", "#6a6d73", "#d8dade", "#fffffe", "#b9bcc2"
# light -> dark. Each has a contrast of 3:1 with the page, and readers with any colour vision can tell any two apart
# (tests/report/test_plots.py has the numbers).
SERIES = {
    "#2847cf": "#7d9cf0",
    "#c18400": "#e56720",
    "#198c67": "#25e58f",
    "#8d6db4": "#d9c3dc",
    "#694600": "#e8e036",
    "#101a66": "#8871ff",
}
DARK = {INK: "#eceef1", MUTED: "#9da2ab", GRID: "#3a3e45", PAPER: "#15171a", BAND: "#5b606a", **SERIES}
COLOURS = list(SERIES)
MARKERS = ["o", "s", "^", "D", "v", "P"]  # so that no line is identified by its colour alone
VARIABLE = {colour: f"--c{i}" for i, colour in enumerate(DARK)}

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 12,
    "figure.facecolor": PAPER,
    "font.size": 11,
    "grid.color": GRID,
    "legend.facecolor": PAPER,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's fonts
    "svg.hashsalt": "hf_disparse",  # the same data gives the same bytes
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
UNIT = 72  # SVG units per inch, so that one unit is one CSS pixel
_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_NAMESPACE = re.compile(r"^\{[^}]*\}")


def styled(draw: Callable[[], Figure]) -> Figure:
    """Runs `draw` in the style above, without warnings about glyphs that matplotlib's font lacks: browsers have them."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = draw()
        figure.draw_without_rendering()  # lays it out while the style applies
    return figure


def save(figure: Figure, path, **kwargs) -> None:
    """Writes a figure into a file of the type of `path`'s suffix, or of `format`."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, **kwargs)


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file."""
    file = io.BytesIO()
    save(figure, file, format="svg", metadata=_METADATA)
    return file.getvalue()


def inline_svg(file: bytes, prefix: str, label: str) -> str:
    """Turns the result of `svg` into SVG for an HTML page: no namespaces, unique ids, colours as variables.

    Args:
        prefix: of the ids, different for each figure.
        label: what a screen reader reads out.
    """
    root = ElementTree.fromstring(file)  # drops comments, which repeat the labels
    for parent in list(root.iter()):
        for child in list(parent):
            if _NAMESPACE.sub("", child.tag) in ("metadata", "style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)", " ".join(v for e in root.iter() for v in e.attrib.values())))
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        attributes = {_NAMESPACE.sub("", key): value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({key: _rewritten(key, value, prefix) for key, value in attributes.items()})
    box = [float(v) for v in root.get("viewBox").split()]
    root.attrib.clear()
    root.attrib.update({"viewBox": " ".join(f"{v:g}" for v in box), "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _rewritten(key: str, value: str, prefix: str) -> str:
    """An attribute's value with prefixed ids, the page's font and colours as CSS variables."""
    if key == "id":
        return prefix + value
    if key == "href" and value.startswith("#"):
        return "#" + prefix + value[1:]
    if key in ("style", "fill", "stroke", "clip-path"):
        value = value.replace("url(#", f"url(#{prefix}")
        if key == "style":
            value = re.sub(r"'?DejaVu Sans'?[^;]*sans-serif", "var(--font)", value)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({VARIABLE[m[0]]})" if m[0] in VARIABLE else m[0], value)
    return value


def css_variables(dark: bool) -> str:
    """CSS declarations of all colours, for the light or the dark page."""
    return " ".join(f"{VARIABLE[light]}: {DARK[light] if dark else light};" for light in DARK)
