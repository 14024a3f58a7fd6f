"""Pictures from numbers: small SVG fragments that take their colours from the page around them.

Every picture says in words what it shows (`label`, which becomes `aria-label`), so that it can also be read aloud.
`unit` says what values are, `x_text` what is to the right. A `kind` is a CSS class, such as `base` or `expanded`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from markupsafe import Markup

WIDTH = 760


@dataclass(frozen=True)
class Estimate:
    """One line of an interval picture.

    Attributes:
        label: What was estimated.
        value: The estimate.
        interval: Its low and high end.
        noise_floor: A factor of at least 1; the band reaches from its inverse to it.
        text: What to write beside it.
        expected: What theory predicts, None if nothing.
    """

    label: str
    value: float
    interval: tuple[float, float]
    noise_floor: float
    text: str
    expected: float | None = None


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return round numbers between two bounds, about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def histogram(edges: Sequence[float], counts: Sequence[int], *, marker: float, marker_text: str, label: str) -> Markup:
    """Draw a histogram of shares, with a vertical line at `marker`; there is one edge more than there are bins."""
    height, left, right, top, bottom = 250, 46, 14, 34, 44
    low, high, tallest = edges[0], edges[-1], max(*counts, 1)
    x, y = _scale(low, high, left, WIDTH - right), _scale(0, tallest, height - bottom, top)
    parts = _grid([count for count in ticks(0, tallest, 4) if count == int(count)], y, left, right, "{:,.0f}")
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            parts.append(_shape("rect", "expanded", f"{start:.1%} to {end:.1%} fewer tokens: {count:,} documents",
                                x=x(start) + 0.5, y=y(count), width=max(1.0, x(end) - x(start) - 1),
                                height=y(0) - y(count)))
    parts += [_text(x(tick), height - bottom + 18, f"{tick:.0%}", anchor="middle") for tick in ticks(low, high, 8)]
    parts.append(_line(left, y(0), WIDTH - right, y(0), "axis"))
    parts.append(_line(x(marker), top - 8, x(marker), y(0), "marker"))
    anchor = "start" if x(marker) < WIDTH * 0.6 else "end"
    parts.append(_text(x(marker) + (6 if anchor == "start" else -6), top - 12, marker_text, anchor=anchor, strong=True))
    parts.append(_text((left + WIDTH - right) / 2, height - 6, "fewer tokens, by document", anchor="middle"))
    return _svg(height, label, parts)


def intervals(estimates: Sequence[Estimate], *, label: str, low_text: str, high_text: str) -> Markup:
    """Draw ratios with their intervals over their noise bands, around a line at 1; texts say what its sides mean."""
    left, right, top, row = 190, 24, 40, 58
    height = top + row * len(estimates) + 40
    ends = [v for e in estimates for v in (*e.interval, e.noise_floor, 1 / e.noise_floor, e.expected or 1.0)]
    low, high = max(0.25, min(*ends, 0.9)), min(4.0, max(*ends, 1.1))  # one wild interval must not hide the others
    low, high = low - (high - low) * 0.05, high + (high - low) * 0.05
    scale, bottom = _scale(low, high, left, WIDTH - right), top + row * len(estimates)

    def x(value: float) -> float:
        return scale(min(max(value, low), high))

    parts = []
    for tick in ticks(low, high, 7):
        parts.append(_line(x(tick), top, x(tick), bottom, "grid"))
        parts.append(_text(x(tick), bottom + 18, f"{tick:g}×", anchor="middle"))
    for index, estimate in enumerate(estimates):
        parts += _estimate_row(estimate, top + row * (index + 0.5), x, left)
    parts.append(_line(x(1), top - 6, x(1), bottom, "axis"))
    parts.append(_text(x(1) - 8, top - 14, f"← {low_text}", anchor="end"))
    parts.append(_text(x(1) + 8, top - 14, f"{high_text} →"))
    return _svg(height, label, parts)


def rounds(values: Sequence[tuple[float, float, float]], *, unit: str, label: str) -> Markup:
    """Draw every round: base, expanded, base again, next to each other, with zero at the bottom."""
    height, left, right, top, bottom = 200, 64, 14, 26, 34
    high = max(max(v) for v in values) * 1.08
    y, step = _scale(0, high, height - bottom, top), (WIDTH - left - right) / len(values)
    parts = [_text(left, 14, unit), *_grid(ticks(0, high, 4), y, left, right)]
    for number, (first, expanded, again) in enumerate(values):
        middle = left + step * (number + 0.5)
        gap = min(26.0, step / 4)
        for offset, value, kind, name in ((-gap, first, "base", "base"), (0, expanded, "expanded", "expanded"),
                                          (gap, again, "base", "base again")):
            parts.append(_dot(middle + offset, y(value), 5.5, kind,
                              f"round {number + 1}, {name}: {value:.4g} {unit}"))
        parts.append(_text(middle, height - 10, f"round {number + 1}", anchor="middle"))
    parts.append(_line(left, y(0), WIDTH - right, y(0), "axis"))
    return _svg(height, label, parts)


def distributions(edges: Sequence[float], counts: Mapping[str, Sequence[int]], *, x_text: str, label: str) -> Markup:
    """Draw a histogram of each kind, over each other, as outlines."""
    height, left, right, top, bottom = 230, 46, 14, 14, 44
    low, high, tallest = edges[0], edges[-1], max(1, *chain.from_iterable(counts.values()))
    x, y = _scale(low, high, left, WIDTH - right), _scale(0, tallest, height - bottom, top)
    whole = [count for count in ticks(0, tallest, 4) if count == int(count)]
    parts = [_line(left, y(0), WIDTH - right, y(0), "axis"), *_grid(whole, y, left, right, "{:,.0f}")]
    for kind, heights in counts.items():
        steps = "".join(f"V{_n(y(count))}H{_n(x(end))}" for count, end in zip(heights, edges[1:], strict=True))
        outline = f"M{_n(x(low))} {_n(y(0))}{steps}V{_n(y(0))}Z"
        parts.append(_shape("path", f"{kind} area", kind, d=outline))
    parts += [_text(x(tick), height - bottom + 18, f"{tick:g}", anchor="middle") for tick in ticks(low, high, 8)]
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_text, anchor="middle"))
    return _svg(height, label, parts)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float, tuple[float, float]]]], *, x_text: str, unit: str, label: str
) -> Markup:
    """Draw values over a load, one line per kind, with their intervals; zero is at the bottom.

    The points of each kind are (load, value, interval), by rising load.
    """
    height, left, right, top, bottom = 260, 64, 24, 30, 46
    every = [point for points in lines.values() for point in points]
    loads = sorted({load for load, _, _ in every})
    high = 1.06 * max(end for _, _, interval in every for end in interval)
    widest = math.log(loads[-1] / loads[0]) or 1.0

    def x(load: float) -> float:  # doubling the load is one step, wherever it starts
        return left + 24 + math.log(load / loads[0]) / widest * (WIDTH - left - right - 48)

    y = _scale(0, high, height - bottom, top)
    parts = [_text(left, 16, unit), *_grid(ticks(0, high, 5), y, left, right)]
    parts += [_text(x(load), height - bottom + 18, f"{load:g}", anchor="middle") for load in loads]
    parts.append(_line(left, y(0), WIDTH - right, y(0), "axis"))
    for number, (kind, points) in enumerate(lines.items()):
        aside = 5 * (number - (len(lines) - 1) / 2)  # so that intervals do not hide each other
        parts.append(_path([(x(load) + aside, y(value)) for load, value, _ in points], kind))
        for load, value, (low, top_end) in points:
            at = x(load) + aside
            parts.append(_line(at, y(low), at, y(top_end), f"{kind} whisker"))
            parts.append(_dot(at, y(value), 4.5, kind,
                              f"{kind} at {load:g}: {value:.4g} ({low:.4g} to {top_end:.4g})"))
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_text, anchor="middle"))
    return _svg(height, label, parts)


def frontier(
    lines: Mapping[str, Sequence[tuple[float, float, str]]], *, chosen: tuple[float, float] | None, x_text: str,
    unit: str, label: str,
) -> Markup:
    """Draw loss over savings, one line per rule, with a ring around the chosen place; both begin at zero.

    The points of each kind are (share saved, loss, what the point is), by rising savings.
    """
    height, left, right, top, bottom = 280, 64, 24, 30, 46
    every = [point for points in lines.values() for point in points]
    widest, tallest = (1.08 * max(1e-9, *values) for values in ([s for s, _, _ in every], [v for _, v, _ in every]))
    lowest = min(0.0, *(loss for _, loss, _ in every))
    x, y = _scale(0, widest, left, WIDTH - right), _scale(lowest, tallest, height - bottom, top)
    parts = [_text(left, 16, unit), *_grid(ticks(0, tallest, 5), y, left, right)]
    parts += [_text(x(tick), height - bottom + 18, f"{tick:.1%}", anchor="middle") for tick in ticks(0, widest, 8)]
    parts.append(_line(left, y(0), WIDTH - right, y(0), "axis"))
    for kind, points in lines.items():
        parts.append(_path([(x(saved), y(loss)) for saved, loss, _ in points], kind))
        parts += [_dot(x(saved), y(loss), 4.5, kind, f"{name}: {saved:.1%} saved, {loss:.4f} lost")
                  for saved, loss, name in points]
    if chosen is not None:
        parts.append(_dot(x(chosen[0]), y(chosen[1]), 9, "expected", "chosen"))
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_text, anchor="middle"))
    return _svg(height, label, parts)


def bars(rows: Sequence[tuple[str, float, str]], *, unit: str, label: str) -> Markup:
    """Draw horizontal bars from zero: (name, value, kind) of each."""
    left, right, row = 130, 90, 34
    height = row * len(rows) + 30
    high = max(value for _, value, _ in rows) or 1.0
    parts = []
    for index, (name, value, kind) in enumerate(rows):
        top = row * index + 6
        length = value / high * (WIDTH - left - right)
        parts += [_text(left - 10, top + 16, name, anchor="end"),
                  _shape("rect", kind, x=left, y=top, width=max(1.0, length), height=22, rx=2),
                  _text(left + length + 8, top + 16, f"{value:.4g}", strong=True)]
    parts.append(_text(left, height - 6, unit))
    return _svg(height, label, parts)


def _estimate_row(estimate: Estimate, y: float, x: Callable[[float], float], left: int) -> list[Markup]:
    low, high = estimate.interval
    floor = estimate.noise_floor
    parts = [
        _shape("rect", "noise", f"noise floor: {1 / floor:.3f} to {floor:.3f}", x=x(1 / floor), y=y - 22,
               width=max(1.0, x(floor) - x(1 / floor)), height=44),
        _line(x(low), y, x(high), y, "interval"),
        _line(x(low), y - 6, x(low), y + 6, "interval"),
        _line(x(high), y - 6, x(high), y + 6, "interval"),
        _dot(x(estimate.value), y, 6.5, "expanded"),
        _text(left - 14, y + 4, estimate.label, anchor="end"),
        _text(x(estimate.value), y - 12, estimate.text, anchor="middle", strong=True),
    ]
    if estimate.expected is not None:
        parts.append(_shape("path", "expected", f"what the lengths alone predict: {estimate.expected:.3f}",
                            d=f"M{_n(x(estimate.expected))} {_n(y + 10)}l-5 9h10z"))
    return parts


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return what puts `low` at `start`, `high` at `end`, and other values in proportion."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(
    values: Sequence[float], y: Callable[[float], float], left: float, right: float, form: str = "{:g}"
) -> list[Markup]:
    """Draw a line across at each value, with the value at its left."""
    return [mark for value in values for mark in (
        _line(left, y(value), WIDTH - right, y(value), "grid"),
        _text(left - 8, y(value) + 4, form.format(value), anchor="end"))]


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, _n(height), label, Markup("").join(parts))


def _text(x: float, y: float, text: str, *, anchor: str = "start", strong: bool = False) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(
        _n(x), _n(y), anchor, Markup(' class="strong"') if strong else "", text)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return _shape("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    return _shape("path", f"{kind} line", d="M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points))


def _dot(x: float, y: float, radius: float, kind: str, title: str = "") -> Markup:
    return _shape("circle", kind, title, cx=x, cy=y, r=radius)


def _shape(element: str, kind: str, title: str = "", **attributes: float | str) -> Markup:
    """Draw an element of CSS class `kind`; browsers show `title` where the pointer rests on it."""
    inside = Markup("").join(Markup(' {}="{}"').format(name, value if isinstance(value, str) else _n(value))
                             for name, value in attributes.items())
    form = '<{0} class="{1}"{2}><title>{3}</title></{0}>' if title else '<{} class="{}"{}/>'
    return Markup(form).format(element, kind, inside, title)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
