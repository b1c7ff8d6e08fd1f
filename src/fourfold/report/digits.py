"""How numbers are written on the page: as many digits as they carry, units beside them."""

from math import floor, isfinite, log10


def figure(value: float | None, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits, whole from there up, thousands grouped: 0.0123, 4.56,
    1,234."""
    if value is None or not isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = floor(log10(abs(value)))
    if size >= 7 or size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def ratio(value: float) -> str:
    """A ratio, always to two places where it is near 1: 0.97×, 3.41×, 12.3×."""
    return f"{value:.2f}×" if value < 10 else f"{figure(value)}×"


def percent(share: float, places: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{places}f} %"


def change(ratio_to_base: float) -> str:
    """A ratio as a signed change: +3.20 %, −12.9 %."""
    percentage = 100 * (ratio_to_base - 1)
    sign = "−" if percentage < 0 else "+"
    return f"{sign}{figure(abs(percentage)) if abs(percentage) >= 1 else f'{abs(percentage):.2f}'} %"


def size(count: float) -> str:
    """Bytes in decimal units to three digits: 269 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{figure(count)} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{figure(count)} TB"


def memory(count: float) -> str:
    """Memory in binary units, as machines are sold: 24.0 GiB."""
    return f"{count / 2**30:.1f} GiB"


def count(number: float) -> str:
    """A count of parameters: 135 M, 8.03 B."""
    for unit, step in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= step:
            return f"{figure(number / step)} {unit}"
    return f"{number:.0f}"
