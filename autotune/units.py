"""Sizes and times for people. Inside the package everything is bytes, seconds and ratios."""

import re

KIB = 1024
MIB = 1024**2
GIB = 1024**3
_EIB = 1024**6

_BYTES_PER_UNIT = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024**4}
_BYTES_PER_UNIT |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | int) -> int:
    """Read a size such as `900MiB`, `80GB` or a plain number of bytes.

    Raises:
        ValueError: the text is no positive size below 1 EiB; the message says what is allowed.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2] not in _BYTES_PER_UNIT:
        allowed = ", ".join(unit for unit in _BYTES_PER_UNIT if unit)
        raise ValueError(f"a size is a number with one of {allowed}")
    size = float(match[1]) * _BYTES_PER_UNIT[match[2]]
    if not 1 <= size < _EIB:
        raise ValueError("a size is at least one byte and less than 1 EiB")
    return int(size)


def format_bytes(size: float) -> str:
    """Binary units with one decimal below a hundred: `61.3 GiB`, `612 MiB`."""
    for unit, factor in (("TiB", 1024**4), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= factor:
            value = size / factor
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.1f} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """`0.31 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_rate(per_second: float) -> str:
    """A throughput with thousands separated: `13 100`."""
    return f"{per_second:,.0f}".replace(",", " ")
