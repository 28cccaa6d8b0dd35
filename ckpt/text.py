"""Numbers in messages."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """Bytes for a reader, in the decimal units of the Hugging Face tools."""
    number = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def seconds(count: float) -> str:
    """A duration for a reader, in seconds; with a tenth where it is short."""
    return f"{count:.1f} s" if count < 10 else f"{count:.0f} s"
