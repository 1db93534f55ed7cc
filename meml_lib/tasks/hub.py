"""Asking the hub for a data set or a model: its cache at once where there is no connection, and what to do without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 10.0
"""For the hub's first answer. Without a network its libraries try on for 24 s (a data set) or 48 s (a model)."""


@contextmanager
def asked_for(what: str, instead: str, *, here: bool = False) -> Iterator[None]:
    """For the block, the hub's libraries use their cache alone if the hub cannot be reached, which is tried once.

    Args:
      what: is asked for, as the values name it.
      instead: what to do without the hub.
      here: it is a folder on this machine; the hub is not asked at all.
    Raises: RuntimeError with both, whatever the block raised.
    """
    from huggingface_hub import constants, get_session

    offline, why = constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set"
    if not offline and not here:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
        except Exception as error:  # of whichever HTTP client it uses
            constants.HF_HUB_OFFLINE, why = True, f"{constants.ENDPOINT} cannot be reached: {error}"
    try:
        yield
    except Exception as error:  # whatever kept it from loading, the ways out are the same
        first = str(error).partition("\n")[0]
        where, todo = "", f"without the hub, {instead}"
        if constants.HF_HUB_OFFLINE and not here:
            where = f" from the cache in {constants.HF_HOME}, nor from the hub ({why})"
            todo = f"connect, or fill the cache on a machine that is connected and set HF_HUB_OFFLINE=1, or {instead}"
        raise RuntimeError(f"{what} could not be loaded{where}: {first}; {todo}") from error
    finally:
        constants.HF_HUB_OFFLINE = offline
