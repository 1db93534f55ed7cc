"""The paper: credit, buffer, losses, the update, and the two stages built of them."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`preview` and `steps` of `anatomy`, for notebooks; torch is imported only when they are asked for."""
    if name not in ("preview", "steps"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from meml_lib.training import anatomy

    return getattr(anatomy, name)
