"""Small SVG charts as text: lines with a band, stacked bars, histograms. Colours are classes of the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 34.0
MAX_DOTS = 300  # places of one line that say their value; more would only make the page large


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    label: str
    points: Points  # nan leaves a gap
    colour: str = "c1"
    band: Sequence[tuple[float, float, float]] = ()  # (x, low, high)
    dots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The size of a chart and what its axes span, in data."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 380.0
    height: float = 210.0
    y_ticks: Sequence[tuple[float, str]] = field(default=())  # empty: chosen here

    def px(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / (high - low) * (self.width - LEFT - RIGHT)

    def py(self, y: float) -> float:
        low, high = self.y
        return self.height - BOTTOM - (y - low) / (high - low) * (self.height - TOP - BOTTOM)

    def draw(self, body: str, *, label: str, x_label: str, whole_x: bool = True) -> Markup:
        """The whole image: grid, tick labels, and ``body`` above them."""
        parts = [f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(label)}">']
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        for value, text in self.y_ticks or [(v, tick_text(v)) for v in ticks(*self.y, count=4)]:
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick end" x="{LEFT - 6:g}" y="{y + 3.5:.1f}">{escape(text)}</text>')
        for value in ticks(*self.x, count=max(2, int(self.width // 80)), whole=whole_x):
            parts.append(
                f'<text class="tick middle" x="{self.px(value):.1f}" y="{bottom + 14:g}">{tick_text(value)}</text>'
            )
        parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
        middle = (LEFT + right) / 2
        parts.append(f'<text class="tick middle" x="{middle:g}" y="{bottom + 29:g}">{escape(x_label)}</text>')
        return Markup("".join([*parts, body, "</svg>"]))


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` round numbers within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(s * power for s in sizes if s * power >= raw * 0.8)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.1e}".replace("e-0", "e-") if abs(value) < 1e-3 else f"{value:.3g}"


def span(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Finite limits around the finite ones of ``values``, never empty."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    pad = 0.06 * (high - low)
    return (low if zero and low == 0 else low - pad), (high if zero and high == 0 else high + pad)


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    show: Callable[[float], str],
    zero: bool = False,
    size: tuple[float, float] = (380.0, 210.0),
    marks: Sequence[float] = (),
    smoothed: bool = True,
    percent: bool = False,
) -> Markup:
    """Lines over one pair of axes; ``marks`` are thin vertical lines. Every dot says its value when pointed at."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for _, *ends in line.band for y in ends]
    low, high = min(xs), max(xs)
    y = span(ys, zero=zero)
    y_ticks = [(v, f"{tick_text(100 * v)} %") for v in ticks(*y, count=4)] if percent else []
    x = (low, high if high > low else low + 1)
    frame = Frame(x=x, y=y, width=size[0], height=size[1], y_ticks=y_ticks)
    bottom = frame.py(frame.y[0])
    body = [
        f'<line class="mark" x1="{frame.px(x):.1f}" x2="{frame.px(x):.1f}" y1="{TOP:g}" y2="{bottom:.1f}"/>'
        for x in marks
    ]
    for line in lines:
        if line.band:
            edge = [(x, top) for x, _, top in line.band] + [(x, base) for x, base, _ in reversed(line.band)]
            body.append(f'<path class="band {line.colour}" d="{_path(frame, edge)}Z"/>')
    for line in lines:
        points, fine = (smooth(line.points), "") if smoothed else (line.points, " fine")
        if points != line.points:  # many noisy points: those faintly, their running mean clearly
            body.append(f'<path class="line faint {line.colour}" d="{_path(frame, line.points)}"/>')
        body.append(f'<path class="line{fine} {line.colour}" d="{_path(frame, points)}"/>')
        stride = 1 + len(line.points) // MAX_DOTS
        body += [_dot(frame, x, y, line, x_label, show) for x, y in line.points[::stride] if math.isfinite(y)]
    return frame.draw("".join(body), label=label, x_label=x_label)


def _dot(frame: Frame, x: float, y: float, line: Line, x_label: str, show: Callable[[float], str]) -> str:
    title = f"<title>{escape(line.label)}, {escape(x_label)} {x:g}: {escape(show(y))}</title>"
    kind = "dot" if line.dots else "hit"
    return (
        f'<circle class="{kind} {line.colour}" cx="{frame.px(x):.1f}" cy="{frame.py(y):.1f}" r="3.5">{title}</circle>'
    )


def smoothing_window(num_points: int) -> int:
    """Points on either side that a running mean takes; 0: too few to smooth."""
    return 0 if num_points < 24 else max(1, num_points // 24)


def smooth(points: Points) -> Points:
    half = smoothing_window(len(points))
    if half == 0:
        return points
    means = []
    for i, (x, _) in enumerate(points):
        around = [y for _, y in points[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        means.append((x, sum(around) / len(around) if around else math.nan))
    return means


def _path(frame: Frame, points: Points) -> str:
    commands, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{pen}{frame.px(x):.1f} {frame.py(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    return "".join(commands)


def stacked_bars(
    columns: Sequence[tuple[str, Sequence[float]]],
    parts: Sequence[tuple[str, str]],
    *,
    x: tuple[float, float],
    label: str,
    x_label: str,
    unit: str,
) -> Markup:
    """Columns of (title, one value per part); ``parts`` are (title, colour); ``x`` is what all columns span."""
    top = max(sum(values) for _, values in columns)
    frame = Frame(x=x, y=(0.0, top * 1.05 or 1.0), width=1080, height=270)
    width = (frame.px(x[1]) - frame.px(x[0])) / len(columns)
    gap, body = min(2.0, 0.2 * width), []
    for i, (title, values) in enumerate(columns):
        height = 0.0
        for (part, colour), value in zip(parts, values, strict=True):
            y, base = frame.py(height + value), frame.py(height)
            height += value
            if base - y < 0.05:
                continue
            body.append(
                f'<rect class="fill {colour}" x="{frame.px(x[0]) + i * width + gap / 2:.1f}" y="{y:.1f}" '
                f'width="{width - gap:.1f}" height="{base - y:.1f}">'
                f"<title>{escape(title)}, {escape(part)}: {value:.2f} {escape(unit)}</title></rect>"
            )
    return frame.draw("".join(body), label=label, x_label=x_label)


def outlines(
    lines: Sequence[tuple[str, str, Sequence[float]]], *, label: str, x_label: str, mark: float | None
) -> Markup:
    """Histograms over [0, 1] as outlines of (title, colour, share per bin), on a logarithmic axis of shares."""
    floor = min((share for _, _, shares in lines for share in shares if share > 0), default=1e-4)
    low = math.floor(math.log10(floor))
    y_ticks = [(float(n), f"{100 * 10.0**n:g} %") for n in range(low, 1)]
    frame = Frame(x=(0.0, 1.0), y=(low - 0.15, 0.05), width=1080, height=270, y_ticks=y_ticks)
    body = []
    if mark is not None:
        body.append(
            f'<line class="mark strong" x1="{frame.px(mark):.1f}" x2="{frame.px(mark):.1f}" y1="{TOP:g}" '
            f'y2="{frame.height - BOTTOM:g}"/>'
            f'<text class="tick" x="{frame.px(mark) + 5:.1f}" y="{TOP + 10:g}">segments open below p = {mark:g}</text>'
        )
    for title, colour, shares in lines:
        width = 1 / len(shares)
        heights = [math.log10(share) if share > 0 else low - 0.15 for share in shares]
        corners = [(i * width + side, height) for i, height in enumerate(heights) for side in (0.0, width)]
        body.append(f'<path class="line {colour}" d="{_path(frame, corners)}"/>')
        for i, (share, height) in enumerate(zip(shares, heights, strict=True)):
            text = f"{escape(title)}: {100 * share:.2f} % of tokens between {i * width:.2f} and {(i + 1) * width:.2f}"
            x = frame.px((i + 0.5) * width)
            body.append(
                f'<circle class="hit {colour}" cx="{x:.1f}" cy="{frame.py(height):.1f}" r="6">'
                f"<title>{text}</title></circle>"
            )
    return frame.draw("".join(body), label=label, x_label=x_label, whole_x=False)
