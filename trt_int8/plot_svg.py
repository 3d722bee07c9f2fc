"""Matplotlib figures as SVG elements of an HTML page.

Figures are `matplotlib.figure.Figure` objects, so that pyplot's global state stays as the user's program left it. What
matplotlib writes is a document of its own; `inline_svg` makes an element of a page out of it: no XML header, no
namespaces, no identifiers that two figures could share, text that stays text in the page's font, and colours that are
CSS variables, so that one figure serves the light and the dark scheme.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: dict[str, tuple[str, str]] = {
    "plot-text": ("#424a53", "#b4bcc6"),
    "plot-line": ("#c9d0d8", "#3d4650"),
    "plot-strong": ("#161b21", "#f0f3f6"),
    "plot-fill": ("#b9c7d9", "#42566f"),
    "plot-page": ("#fefefe", "#171b21"),
    "method-minmax": ("#6b7684", "#a3adb8"),
    "method-entropy": ("#1f6feb", "#6cb0ff"),
    "method-percentile": ("#c4530a", "#f0934e"),
    "method-mse": ("#0f7f5f", "#45c49b"),
    "method-auto": ("#a1418f", "#e08fd0"),
    "precision-fp32": ("#8893a0", "#76818d"),
    "precision-fp16": ("#4a8f9c", "#62b0bf"),
    "precision-int8": ("#2a63c8", "#5c9cf5"),
    "precision-tf32": ("#a3a1ae", "#94919f"),
    "precision-int8-fp16": ("#6a4fc0", "#a28af0"),
    "precision-other": ("#9a8a6a", "#b5a27c"),
    "dtype-float": ("#8893a1", "#76818e"),
    "dtype-float16": ("#4a8f9d", "#62b0c0"),
    "dtype-int8": ("#2a63c9", "#5c9cf6"),
    "dtype-int32": ("#9a6fc4", "#b592dd"),
    "dtype-other": ("#c98a1b", "#e0aa4a"),
    "dtype-rest": ("#d5dae1", "#343c46"),
}
"""CSS variable to its colours on a light and a dark page. No light colour occurs twice: it stands for its variable."""

COLOUR = {name: light for name, (light, _) in PALETTE.items()}
"""CSS variable to the colour that stands for it in a drawing."""

_VARIABLE_OF = {light: f"var(--{name},{light})" for name, (light, _) in PALETTE.items()}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trt-int8",
    "path.simplify": False,
    "text.parse_math": False,
}
"""Text as text; identifiers that follow from the drawing, so that equal data give equal pages; names that hold a `$`
are names."""


@contextmanager
def empty_figure(width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure, sizes in inches; matplotlib's settings are its defaults and ours until the block ends."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", _SETTINGS]), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), facecolor="none", edgecolor="none")
        FigureCanvasSVG(figure)
        yield figure


def make_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes with two spines, sizes as shares of the figure."""
    axes = figure.add_axes((left, bottom, width, height), facecolor="none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOUR["plot-line"])
    axes.tick_params(length=2.5, color=COLOUR["plot-line"], labelcolor=COLOUR["plot-text"], labelsize=7.5, pad=2)
    return axes


def round_positions(low: float, high: float) -> list[float]:
    """Return three to six round positions within the limits."""
    raw = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = min((factor * magnitude for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - raw))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Render a figure as an `<svg>` element for an HTML page.

    Args:
        figure: the drawing.
        name: prefix of the identifiers that the element needs (clip paths, markers).
        description: the figure in words, for those who cannot see it.
    """
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ET.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(_compact(attributes))
        element.text = (element.text or "").strip() or None
        element.tail = None
    for parent in list(root.iter()):
        for child in [
            child for child in parent if child.tag in ("metadata", "style") or (child.tag == "defs" and not len(child))
        ]:
            parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', ET.tostring(root, encoding="unicode")))
    for element in root.iter():
        _rename(element, used, name)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    root.attrib.clear()
    root.attrib.update(
        {
            "class": "plot",
            "role": "img",
            "aria-label": description,
            "viewBox": f"0 0 {width:g} {height:g}",
            "width": f"{width * 4 / 3:.0f}",
            "height": f"{height * 4 / 3:.0f}",
        }
    )
    return ET.tostring(root, encoding="unicode", short_empty_elements=False)


def _compact(attributes: dict[str, str]) -> dict[str, str]:
    """Shorten what matplotlib writes, a tenth of a point being finer than any screen; leave font and colours to CSS."""
    short: dict[str, str] = {}
    for key, value in attributes.items():
        match key:
            case "d":
                short[key] = _rounded(" ".join(value.split()), 1)
            case "x" | "y" | "width" | "height" | "transform":
                short[key] = _rounded(value, 2)
            case "style":
                without_font = re.sub(
                    r"(font: .*?px) [^;]*", r"\1 sans-serif", re.sub(r"font-family:[^;]*; ", "", value)
                )
                short[key] = re.sub(r"#[0-9a-f]{6}\b", lambda found: _VARIABLE_OF.get(found[0], found[0]), without_font)
            case _:
                short[key] = value
    return short


def _rounded(text: str, digits: int) -> str:
    return re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), digits):g}", text)


def _rename(element: ET.Element, used: set[str], name: str) -> None:
    identifier = element.attrib.pop("id", None)
    if identifier in used:
        element.set("id", f"{name}-{identifier}")
    for key, value in element.attrib.items():
        if key == "href":
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
