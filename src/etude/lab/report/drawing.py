"""Pictures of the report as inline SVG: a study's figure, and a claim's effect with its interval."""

import io
import math
import re
from html import escape

import matplotlib as mpl
from matplotlib.figure import Figure

from etude.lab.rules import Finding

__all__ = ["figure_svg", "interval_svg"]

WIDTH, HEIGHT, EDGE = 220, 26, 8


def figure_svg(figure: Figure, name: str, title: str) -> str:
    """A matplotlib figure as SVG that stands alone: same bytes for same data, ids that clash with no other's.

    Text stays text, and black becomes the page's own text colour, so that it reads in light and in dark.
    """
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"(stroke|fill): (?:#000000|black)", r"\1: currentColor", svg)
    svg = svg.replace("<text ", '<text fill="currentColor" ')
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def interval_svg(finding: Finding) -> str:
    """The effect as a dot, its interval as a line, and the bound it is held against as a tick."""
    effect = finding.effect
    bounds = [float(text) for text in re.findall(r"[-±]?\d+\.?\d*(?:e-?\d+)?", finding.bound.replace("±", ""))][:1]
    known = [value for value in (effect.low, effect.mean, effect.high, *bounds) if math.isfinite(value)]
    if not math.isfinite(effect.mean) or not known:
        return ""
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        inside = min(max(value, low), high)
        return EDGE + (inside - low) / span * (WIDTH - 2 * EDGE)

    ticks = "".join(f'<line class="bound" x1="{place(b):.1f}" x2="{place(b):.1f}" y1="3" y2="23"/>' for b in bounds)
    label = escape(
        f"effect {effect.mean:.4g}, interval {effect.low:.4g} to {effect.high:.4g}, {finding.bound}", quote=True
    )
    return (
        f'<svg class="interval" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}">{ticks}'
        f'<line class="range" x1="{place(effect.low):.1f}" x2="{place(effect.high):.1f}" y1="13" y2="13"/>'
        f'<circle class="effect" cx="{place(effect.mean):.1f}" cy="13" r="4.5"/></svg>'
    )
