"""Plots as SVG, drawn by hand: no library on the page, and the same bytes for the same numbers.

Every plot has a title and a description for screen readers, and every mark a title with its values. Colours are classes
of the page's style sheet, so that one drawing serves its dark and its light scheme.

Legend: K bars, bins or cells.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

from softlabel.report.figures import Histogram, Reliability
from softlabel.report.number_text import format_count, format_number, format_share, shorten

WIDTH = 420
_ADVANCE = 6.7  # mean width of a character of 12 pixels
_FEW = 10  # rows of a bin
SERIES = 8  # lines that differ in colour, dash and mark

Number = float | None


def element(tag: str, *inner: Markup | str, **attributes: object) -> Markup:
    """Return one element with escaped attributes and text; `class_` and `fill_opacity` become class, fill-opacity."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    opened = Markup("").join(
        Markup(' {}="{}"').format(name, _compact(value) if isinstance(value, float) else value)
        for name, value in named.items()
    )
    return Markup("<{}{}>{}</{}>").format(tag, opened, Markup("").join(escape(one) for one in inner), tag)


def _compact(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _mark(tag: str, hint: str, **attributes: object) -> Markup:
    return element(tag, element("title", hint), **attributes)


def _text(x: float, y: float, text: str, **attributes: object) -> Markup:
    return element("text", text, x=x, y=y, **attributes)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("path", d=f"M{_compact(x1)} {_compact(y1)}L{_compact(x2)} {_compact(y2)}", class_=class_)


def _rect(x: float, y: float, width: float, height: float) -> str:
    """The path of a rectangle, which is shorter than the element."""
    return f"M{_compact(x)} {_compact(y)}h{_compact(width)}v{_compact(height)}h{_compact(-width)}z"


def _plot(parts: Sequence[Markup], width: float, height: float, title: str, desc: str, *, wide: bool = False) -> Markup:
    return element(
        "svg",
        element("title", title),
        element("desc", desc),
        *parts,
        class_="plot wide" if wide else "plot",
        role="img",
        viewBox=f"0 0 {_compact(width)} {_compact(height)}",
        width=width,
        height=height,
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span a range, about as many as asked for."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * one for one in (1, 2, 2.5, 5) if power * one >= rough), power * 10)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """The frame of a plot with two axes: the scales, grid lines and their texts."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, width: float = WIDTH, height: float = 250
    ) -> None:
        self.x, self.y = x, (y[0], y[1] if y[1] > y[0] else y[0] + 1)
        self.left, self.right, self.top, self.bottom = 52.0, width - 20, 14.0, height - 44

    def at_x(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def frame(
        self, x_label: str, y_label: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
    ) -> list[Markup]:
        parts = []
        for value in ticks(*self.y, 4):
            parts.append(_line(self.left, self.at_y(value), self.right, self.at_y(value), "grid"))
            parts.append(_text(self.left - 6, self.at_y(value) + 4, y_text(value), class_="tick", text_anchor="end"))
        for value in ticks(*self.x, 5):
            parts.append(_text(self.at_x(value), self.bottom + 16, x_text(value), class_="tick", text_anchor="middle"))
        parts.append(_line(self.left, self.bottom, self.right, self.bottom, "axis"))
        middle = (self.left + self.right) / 2
        parts.append(_text(middle, self.bottom + 34, x_label, class_="name", text_anchor="middle"))
        across = (self.top + self.bottom) / 2
        turned = f"rotate(-90 12 {_compact(across)})"
        parts.append(_text(12.0, across, y_label, class_="name", text_anchor="middle", transform=turned))
        return parts


def _tick_count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _tick_share(value: float) -> str:
    return f"{value * 100:g}%"


def draw_bars(
    names: Sequence[str],
    values: Sequence[Number],
    *,
    title: str,
    desc: str,
    text: Callable[[Number], str] = format_share,
    top: float | None = None,
    reference: float | None = None,
    hints: Sequence[str] | None = None,
    logarithmic: bool = False,
) -> Markup:
    """Horizontal bars with their values behind them.

    Args:
        names, values: K; None leaves its bar out.
        text: how a value is written.
        top: of the scale; by default the largest value.
        reference: value of a dashed line over all bars.
        hints: K texts for hovering; by default name and value.
        logarithmic: from the power of ten below the smallest positive value.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    high = top or max((abs(value) for value in known), default=1.0) or 1.0
    low = min((value for value in known if value > 0), default=high)
    base = 10.0 ** math.floor(math.log10(low) - 0.2)
    shown = [shorten(name, 24) for name in names]
    left = min(170.0, max((len(name) for name in shown), default=1) * _ADVANCE + 14)
    room = WIDTH - left - 14 - max((len(text(value)) for value in values), default=1) * 7.0
    step, parts = 23.0, []

    def length(value: float) -> float:
        part = math.log(value / base) / math.log(high / base) if logarithmic and value > 0 else value / high
        return max(0.0, min(1.0, part)) * room

    for row, (name, value) in enumerate(zip(shown, values, strict=True)):
        y = row * step + 4
        hint = hints[row] if hints else f"{names[row]}: {text(value)}"
        parts.append(_text(left - 8, y + 12.5, name, class_="label", text_anchor="end"))
        parts.append(element("rect", x=left, y=y, width=room, height=16.0, rx=2, class_="track"))
        if value is not None and math.isfinite(value) and value != 0:
            wide = max(length(value), 1.5)
            parts.append(_mark("rect", hint, x=left, y=y, width=wide, height=16.0, rx=2, class_="f1"))
        parts.append(_text(float(WIDTH - 2), y + 12.5, text(value), class_="value", text_anchor="end"))
    height = len(names) * step + 8
    if reference is not None:
        parts.append(_line(left + length(reference), 0, left + length(reference), height - 6, "dashed"))
    return _plot(parts, WIDTH, height, title, desc)


def draw_histogram(
    histogram: Histogram, *, title: str, desc: str, x_label: str, y_label: str, mean: float | None = None
) -> Markup:
    """Vertical bars over a range, with a dashed line at the mean."""
    edges, counts = histogram.edges, histogram.counts
    axes = _Axes((edges[0], edges[-1]), (0, max(counts, default=0)))
    axes.top += 10
    parts = axes.frame(x_label, y_label, lambda value: f"{value:g}", _tick_count)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            x, y = axes.at_x(low), axes.at_y(count)
            path = _rect(x + 0.5, min(y, axes.bottom - 1), max(axes.at_x(high) - x - 1, 0.5), max(axes.bottom - y, 1))
            hint = f"{format_number(low)} to {format_number(high)}: {format_count(count)}"
            parts.append(_mark("path", hint, d=path, class_="f1"))
    if mean is not None and math.isfinite(mean):
        x = axes.at_x(min(max(mean, edges[0]), edges[-1]))
        parts.append(_line(x, axes.top - 6, x, axes.bottom, "dashed"))
        anchor, shift = ("end", -5) if x > (axes.left + axes.right) / 2 else ("start", 5)
        parts.append(_text(x + shift, axes.top - 8, f"mean {format_number(mean)}", class_="value", text_anchor=anchor))
    return _plot(parts, WIDTH, 250, title, desc)


def draw_reliability(one: Reliability, after: Reliability | None = None, *, title: str, desc: str) -> Markup:
    """Accuracy over confidence in bars, the diagonal of good calibration, and how many rows each bin has below.

    The gap between a bar and the diagonal is filled where it is too confident, dashed where it is not enough. A second
    set of answers, after a fit, is a line with diamonds.
    """
    width, height = 330.0, 316.0
    axes = _Axes((0, 1), (0, 1), width=width, height=270)
    parts = axes.frame("confidence", "accuracy", _tick_share, _tick_share)
    bins, most = len(one.counts), max(one.counts, default=0) or 1
    wide = (axes.right - axes.left) / max(bins, 1)
    for number, (confidence, accuracy, count) in enumerate(zip(one.confidence, one.accuracy, one.counts, strict=True)):
        if confidence is None or accuracy is None or not count:
            continue
        x, y, gap = axes.at_x(number / bins), axes.at_y(accuracy), axes.at_y(confidence)
        hint = f"confidence {format_share(confidence)}, accuracy {format_share(accuracy)}, {format_count(count)} rows"
        parts.append(_mark("path", hint, d=_rect(x + 1, y, wide - 2, axes.bottom - y), class_="f1"))
        if abs(gap - y) > 1:
            side = "over" if confidence > accuracy else "under"
            path = _rect(x + 1, min(gap, y), wide - 2, abs(gap - y))
            parts.append(_mark("path", hint, d=path, class_=f"gap {side}"))
        tall = max(1.5, 30 * count / most)
        parts.append(_mark("path", hint, d=_rect(x + 1, height - 4 - tall, wide - 2, tall), class_="f0"))
    parts.append(_line(axes.at_x(0), axes.at_y(0), axes.at_x(1), axes.at_y(1), "dashed"))
    marks: list[Markup] = []
    if after is not None:
        line = []
        for confidence, accuracy, count in zip(after.confidence, after.accuracy, after.counts, strict=True):
            if confidence is None or accuracy is None:
                continue
            x, y = axes.at_x(confidence), axes.at_y(accuracy)
            hint = f"after the fit: confidence {format_share(confidence)}, accuracy {format_share(accuracy)}, "
            hint += f"{format_count(count)} rows"
            marks.append(_mark("path", hint, d=_marker(3, x, y), class_="dot fitted"))
            # The accuracy of a handful of rows says little: its diamond stays off the line.
            if count >= _FEW:
                line.append(f"{_compact(x)} {_compact(y)}")
        if line:
            parts.append(element("path", d=f"M{'L'.join(line)}", class_="line fitted"))
    parts += marks
    parts.append(_line(axes.left, height - 4, axes.right, height - 4, "axis"))
    parts.append(_text(axes.left - 6, height - 6, "rows", class_="tick", text_anchor="end"))
    return _plot(parts, width, height, title, desc)


def draw_heat_map(
    row_names: Sequence[str],
    column_names: Sequence[str],
    values: Sequence[Sequence[Number]],
    *,
    title: str,
    desc: str,
    text: Callable[[Number], str] = format_share,
    axis_names: tuple[str, str] = ("", ""),
    low: float = 0.0,
    logarithmic: bool = False,
    letters: int = 16,
    blank: float = 0.0,
) -> Markup:
    """Cells whose opacity is the value; with numbers in them where they are few.

    Args:
        row_names, column_names: names of the two axes' cells; '' for none at this one.
        values: by row and column; None for no value.
        text: how a value is written.
        axis_names: of rows and of columns.
        low: the value of the faintest cell.
        logarithmic: opacity grows with the logarithm of 1 + value, as counts need it.
        letters: to which names are cut.
        blank: values below it are not written into their cells.
    """
    high = max((value for row in values for value in row if value is not None and math.isfinite(value)), default=1.0)
    few = max(len(row_names), len(column_names)) <= 12
    size = (46.0, 30.0) if few else (max(11.0, min(18.0, 480 / len(column_names))),) * 2
    rows, columns = ([shorten(one, letters) if one else "" for one in names] for names in (row_names, column_names))
    left = max((len(one) for one in rows), default=0) * _ADVANCE + (30 if axis_names[0] else 12)
    widest = max((len(one) for one in columns), default=0) * _ADVANCE
    turned = widest > size[0] - 4
    # Names at 45 degrees would overlap where columns are narrow.
    dense = size[0] < 15
    above = (widest * (0.9 if dense else 0.72) + 16 if turned else 22) + (18 if axis_names[1] else 0)
    label = "label dense" if dense else "label"
    width, height = left + size[0] * len(columns) + 44, above + size[1] * len(rows) + 6
    parts = []
    for column, name in enumerate(columns):
        x = left + (column + 0.5) * size[0]
        angle = -90 if dense else -45
        way = f"rotate({angle} {_compact(x + 4 * dense)} {_compact(above - 6)})" if turned else None
        if name:
            anchor = None if turned else "middle"
            parts.append(_text(x + 4 * dense, above - 6, name, class_=label, transform=way, text_anchor=anchor))
    for row, (name, cells) in enumerate(zip(rows, values, strict=True)):
        y = above + row * size[1]
        parts.append(_text(left - 6, y + size[1] / 2 + 4, name, class_=label, text_anchor="end"))
        for column, value in enumerate(cells):
            shade = _shade(value, low, high, logarithmic)
            if shade is None or (shade < 0.004 and not few):
                continue
            x = left + column * size[0]
            hint = f"{row_names[row] or row + 1} / {column_names[column] or column + 1}: {text(value)}"
            path = _rect(x + 0.5, y + 0.5, size[0] - 1, size[1] - 1)
            parts.append(_mark("path", hint, d=path, class_="cell", fill_opacity=shade))
            if few and value is not None and value >= blank:
                # Where white becomes easier to read than black: on the colours of the light scheme, and of the dark.
                tone = "in light-on dark-off" if shade >= 0.73 else "in dark-off" if shade >= 0.55 else "in"
                number = text(value)
                parts.append(_text(x + size[0] / 2, y + 19, number, class_=tone, text_anchor="middle"))
    parts.append(element("path", d=_rect(left, above, size[0] * len(columns), size[1] * len(rows)), class_="frame"))
    if axis_names[1]:
        parts.append(_text(left, 14, f"{axis_names[1]} →", class_="name"))
    if axis_names[0]:
        across = above + size[1] * len(rows) / 2
        way = f"rotate(-90 12 {_compact(across)})"
        parts.append(_text(12, across, f"← {axis_names[0]}", class_="name", text_anchor="middle", transform=way))
    return _plot(parts, width, height, title, desc, wide=width > WIDTH)


def _shade(value: Number, low: float, high: float, logarithmic: bool) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    if logarithmic:
        return math.log1p(max(value, 0.0)) / (math.log1p(high) or 1.0)
    return min(1.0, max(0.0, (value - low) / ((high - low) or 1.0)))


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, desc: str, x_label: str, y_label: str
) -> Markup:
    """Curves of up to `SERIES` names, which differ in colour, dash and mark; a legend stands below."""
    kept = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in list(series.items())[:SERIES]
    }
    xs = [x for points in kept.values() for x, _ in points] or [0.0, 1.0]
    ys = [y for points in kept.values() for _, y in points] or [0.0, 1.0]
    margin = (max(ys) - min(ys)) * 0.06 or abs(ys[0]) * 0.05 or 1.0
    axes = _Axes((min(xs), max(xs)), (min(ys) - margin, max(ys) + margin))
    parts = axes.frame(x_label, y_label, lambda value: f"{value:g}", lambda value: f"{value:g}")
    for number, (name, points) in enumerate(kept.items(), 1):
        places = [(axes.at_x(x), axes.at_y(y)) for x, y in points]
        if len(places) > 1:
            way = "L".join(f"{_compact(x)} {_compact(y)}" for x, y in places)
            parts.append(element("path", d=f"M{way}", class_=f"line l{number}"))
        for (x, y), (epoch, value) in zip(places, points, strict=True):
            hint = f"{name}, {x_label} {epoch:g}: {format_number(value)}"
            parts.append(_mark("path", hint, d=_marker(number, x, y), class_=f"dot f{number}"))
        y = 262.0 + (number - 1) * 18
        parts.append(_line(axes.left, y, axes.left + 28, y, f"line l{number}"))
        parts.append(element("path", d=_marker(number, axes.left + 14, y), class_=f"dot f{number}"))
        parts.append(_text(axes.left + 36, y + 4, shorten(name, 52), class_="label"))
    return _plot(parts, WIDTH, 258.0 + len(kept) * 18, title, desc)


def _marker(number: int, x: float, y: float) -> str:
    """The path of a mark that differs from series to series: circle, square, diamond or triangle."""
    shape = number % 4
    place = f"M{_compact(x)} {_compact(y)}"
    if shape == 1:
        return f"{place}m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z"
    if shape == 2:
        return f"{place}m-3-3h6v6h-6z"
    if shape == 3:
        return f"{place}m0-4l4 4l-4 4l-4-4z"
    return f"{place}m0-4l3.8 6.6h-7.6z"


def draw_dendrogram(
    names: Sequence[str], merges: Sequence[tuple[int, int, float, int]], *, title: str, desc: str
) -> Markup:
    """Merges of clusters as brackets, leaves from top to bottom so that none cross."""
    count, step, left = len(names), 17.0, 150.0
    width, furthest = WIDTH - left - 16, max((distance for *_, distance, _ in merges), default=0.0) or 1.0
    children = {count + number: (one, other) for number, (one, other, _, _) in enumerate(merges)}
    order, waiting = [], [count + len(merges) - 1] if merges else []
    while waiting:
        cluster = waiting.pop()
        if cluster in children:
            waiting += reversed(children[cluster])
        else:
            order.append(cluster)
    places = {leaf: (left, (row + 0.5) * step + 22) for row, leaf in enumerate(order)}
    parts = [
        _text(left - 8, y + 4, shorten(names[leaf], 20), class_="label", text_anchor="end")
        for leaf, (_, y) in places.items()
    ]
    for value in ticks(0, furthest, 4):
        x = left + value / furthest * width
        parts.append(_line(x, 18, x, count * step + 24, "grid"))
        parts.append(_text(x, 12, f"{value:g}", class_="tick", text_anchor="middle"))
    for number, (one, other, distance, size) in enumerate(merges):
        (x1, y1), (x2, y2) = places[one], places[other]
        x = left + max(distance, 0.0) / furthest * width
        path = f"M{_compact(x1)} {_compact(y1)}H{_compact(x)}V{_compact(y2)}H{_compact(x2)}"
        hint = f"{size} classes meet at distance {format_number(distance)}"
        parts.append(_mark("path", hint, d=path, class_="line l1 open"))
        places[count + number] = (x, (y1 + y2) / 2)
    return _plot(parts, WIDTH, count * step + 32, title, desc)
