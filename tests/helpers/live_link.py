"""A packet of Live Link Face."""

from __future__ import annotations

import struct


def live_link(frame: int = 1, **values: float) -> bytes:
    """Return packet number `frame` with `_N=value` at its N-th place (17: jawOpen, 52: yaw), 0 at the others."""
    numbers = [0.0] * 61
    for place, value in values.items():
        numbers[int(place[1:])] = value
    head = struct.pack("<I", 6) + b"$" + b"0" * 36 + struct.pack("!i", 6) + b"iPhone"
    return head + struct.pack("!4I", frame, 0, 60, 1) + struct.pack("!B61f", 61, *numbers)
