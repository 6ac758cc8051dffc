"""Counts, FLOPs and bytes as people read them: three significant digits and a unit."""

from collections.abc import Sequence

_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BYTES = ((2.0**40, " TiB"), (2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"), (1.0, " B"))


def format_count(count: float) -> str:
    """A count such as 3.04B, 58.4k, 512; `recipe.parse_count` reads it back, to three digits."""
    return _scaled(count, _COUNTS)


def format_bytes(count: float) -> str:
    """An amount of memory in binary units, such as 12.6 GiB (1 GiB = 2**30 bytes)."""
    return _scaled(count, _BYTES)


def format_flops(count: float) -> str:
    """An amount of work such as 2.27e21 FLOPs; below a thousand, the plain number."""
    if abs(count) < 1000:
        return f"{count:.3g} FLOPs"
    mantissa, exponent = f"{count:.2e}".split("e")
    return f"{mantissa}e{int(exponent)} FLOPs"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    # Compared after rounding, so that 999,999 reads 1M and not 1e+03k.
    size, suffix = next(((s, u) for s, u in units if abs(_round(value / s)) >= 1), units[-1])
    return f"{_round(value / size):.10g}{suffix}"


def _round(value: float) -> float:
    # Binary units go up to 1023, which needs a fourth digit.
    return float(f"{value:.3g}") if abs(value) < 1000 else float(round(value))
