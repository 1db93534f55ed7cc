"""pytest reads every module for doctests; one cannot be imported without trl."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("trl") else ["peer.py"]
