"""The paper: credit, buffer, losses, the update, and the two stages built of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from meml_lib.config import Run
    from meml_lib.training.anatomy import Preview
    from meml_lib.training.riel import Step


def preview(p: Run) -> Preview:
    """See `anatomy.preview`; torch is imported only here."""
    from meml_lib.training import anatomy

    return anatomy.preview(p)


def steps(p: Run, *, questions_per_step: int) -> Iterator[Step]:
    """See `anatomy.steps`."""
    from meml_lib.training import anatomy

    return anatomy.steps(p, questions_per_step=questions_per_step)
