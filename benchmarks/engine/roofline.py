"""The roofline picture as SVG: operations a second over operations a byte, both axes logarithmic.

A dot is a row of an engine: its intensity is what its weights' bits imply (see limits.py), its height what it
reached. Two roofs: int8 for 4-bit weights, bfloat16 for the others; below them memory is the slope they
share."""

import math
from dataclasses import dataclass
from html import escape

from contenders import CONTENDERS, OURS
from limits import work_of
from results import EngineBenchmark, Limits, ModelRun

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 720, 420, 64, 36, 52, 220
COLOURS = ["#c2410c", "#1d4ed8", "#0e7490", "#93c5fd", "#67e8f9", "#15803d", "#a3e635", "#6b7280"]
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#374151}.title{font-size:14px;font-weight:600}"
    ".grid{stroke:#e5e7eb}.roof{stroke:#111827;fill:none;stroke-width:1.5}"
)


@dataclass(frozen=True)
class Axes:
    """From values to pixels; ``left`` to ``right`` and ``low`` to ``high`` are powers of ten."""

    left: float
    right: float
    low: float
    high: float
    top: int

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return LEFT + (math.log10(value) - self.left) / (self.right - self.left) * (WIDTH - LEFT - 16)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        span = HEIGHT - TOP - BOTTOM
        return self.top + TOP + (1 - (math.log10(value) - self.low) / (self.high - self.low)) * span


def draw(result: EngineBenchmark) -> str:
    """One panel below the other for each model."""
    panels = [panel(result.limits, m, i * HEIGHT) for i, m in enumerate(result.models)]
    size = f'viewBox="0 0 {WIDTH + LEGEND} {HEIGHT * len(panels)}"'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    body = "\n".join(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{background}\n{body}\n</svg>\n'
    )


def panel(limits: Limits, model: ModelRun, top: int) -> str:
    """Roofs, dots, axes and legend of one model."""
    dots = points(model)
    if not dots:
        return ""
    low = math.floor(math.log10(min(y for *_, y in dots)))
    high = math.ceil(math.log10(limits.int8_ops_s))
    axes = Axes(-0.2, 3.5, low, high, top)
    parts = [
        text(LEFT, top + 14, f"{model.model}: {model.matrix_values / 1e6:,.0f} million weights", "title")
    ]
    parts += [*grid_lines(axes), *roofs(limits, axes)]
    engines = list(dict.fromkeys(engine for engine, *_ in dots))
    parts += [
        text(axes.x(x), axes.y(y) - 9, row, anchor="middle") for engine, row, x, y in dots if engine == OURS
    ]
    parts += [dot(axes, *each) for each in dots]
    parts += legend(engines, top)
    return "\n".join(parts)


def points(model: ModelRun) -> list[tuple[str, str, float, float]]:
    """Engine, row, operations a byte, operations a second."""
    bits = {c.name: c.bits for c in CONTENDERS}
    rows = {row.name: row for row in model.rows}
    found = []
    for m in model.measured:
        work = work_of(model, rows[m.row], bits[m.engine])
        found.append((m.engine, m.row, work.intensity, m.median * work.operations / work.tokens))
    return found


def colour(engine: str) -> str:
    """One for each engine, the same in every picture."""
    return COLOURS[[c.name for c in CONTENDERS].index(engine) % len(COLOURS)]


def dot(axes: Axes, engine: str, row: str, intensity: float, reached: float) -> str:
    """A circle that says what it is when pointed at."""
    label = escape(f"{engine}, {row}: {reached / 1e9:.0f} GOPS at {intensity:.0f} operations a byte")
    place = f'cx="{axes.x(intensity):.1f}" cy="{axes.y(reached):.1f}"'
    return f'<circle {place} r="5" fill="{colour(engine)}" fill-opacity=".85"><title>{label}</title></circle>'


def roofs(limits: Limits, axes: Axes) -> list[str]:
    """The slope of memory up to int8's roof, and bfloat16's roof from where it leaves the slope."""
    parts = []
    for name, peak in (("int8", limits.int8_ops_s), ("bf16", limits.bf16_ops_s)):
        knee, start = peak / limits.read_bytes_s, max(10**axes.left, 10**axes.low / limits.read_bytes_s)
        corners = [(start, start * limits.read_bytes_s), (knee, peak), (10**axes.right, peak)]
        path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in corners)
        parts.append(f'<polyline class="roof" points="{path}"/>')
        label = f"{name} {peak / 1e9:,.0f} GOPS"
        place = axes.y(peak) + (-6 if name == "int8" else 14)
        parts.append(text(WIDTH - 18, place, label, anchor="end"))
    label = f"memory {limits.read_bytes_s / 1e9:.1f} GB/s"
    parts.append(text(axes.x(0.8), axes.y(9 * limits.read_bytes_s), label))
    return parts


def grid_lines(axes: Axes) -> list[str]:
    """Powers of ten, with their names."""
    parts, bottom = [], axes.y(10**axes.low)
    for power in range(int(axes.low), int(axes.high) + 1):
        y = axes.y(10**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 6, y + 4, f"{10 ** (power - 9):g}", anchor="end"))
    for power in range(int(axes.left), int(axes.right) + 1):
        x = axes.x(10**power)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.top + TOP}" y2="{bottom:.1f}"/>'
        )
        parts.append(text(x, bottom + 16, f"{10**power}", anchor="middle"))
    parts.append(text((LEFT + WIDTH) / 2, bottom + 36, "operations for each byte read", anchor="middle"))
    parts.append(text(LEFT, axes.top + TOP - 6, "10⁹ operations a second"))
    return parts


def legend(engines: list[str], top: int) -> list[str]:
    """Names beside their colours."""
    parts = []
    for i, engine in enumerate(engines):
        y = top + TOP + 14 + 20 * i
        parts.append(f'<circle cx="{WIDTH + 10}" cy="{y - 4}" r="5" fill="{colour(engine)}"/>')
        parts.append(text(WIDTH + 22, y, engine))
    return parts


def text(x: float, y: float, words: str, name: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">{escape(words)}</text>'
