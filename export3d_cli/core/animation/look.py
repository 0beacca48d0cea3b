"""Attributes of a person that can be changed in a photo."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, fields

from export3d_cli.core.runtime.errors import InputError

# At each limit a face embedder's cosine to the photo is .79 or more on 12 people; it is .23 or less between them. 60
# years would give .74.
RANGES = {"age": (-20.0, 40.0), "weight": (-1.0, 1.0), "beard": (0.0, 1.0)}


@dataclass(frozen=True)
class Look:
    """Changes of a look; raises `InputError` for values out of range."""

    age: float = 0.0  # years to add, -20 to 40
    weight: float = 0.0  # -1, much leaner, to 1, much heavier
    hair: str = ""  # #rrggbb, the colour that the hair shows on average; empty: its own
    beard: float = 0.0  # stubble, 0 to 1

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be {low:g} to {high:g}, got {getattr(self, name):g}")
        if self.hair and not re.fullmatch("#[0-9a-fA-F]{6}", self.hair):
            raise InputError(f"hair must be a colour such as #5b3a1e, got {self.hair[:40]!r}")

    def __bool__(self) -> bool:
        return self != Look()

    @classmethod
    def parse(cls, text: str) -> Look:
        """Return the look of a text such as `age=15,weight=-.3,hair=#5b3a1e`; raises `InputError`."""
        values: dict[str, str | float] = {}
        for name, _, value in (part.partition("=") for part in text.split(",")):
            names = [field.name for field in fields(cls)]
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0)[0]
                raise InputError(f"there is no attribute {name[:40]!r}: did you mean {near}?")
            try:
                values[name] = value if name == "hair" else float(value)
            except ValueError:
                raise InputError(f"{name} must be a number, got {value[:40]!r}") from None
        return cls(**values)  # type: ignore[arg-type]
