"""Imports what ranks will need into the forkserver, once, before it forks any of them.

Only the forkserver imports this module. A module that is absent or broken is passed over: the
rank that needs it imports it again and reports the error as its own.
"""

import contextlib
import gc
import importlib
import json
import os
import sys

REQUEST = "MEGALLAMA_PRELOAD"
"""Environment variable with JSON: `sys_path`, the parent's, and `modules`, the names to import."""


def preload(request: str) -> None:
    """Take over the parent's module search path and import the modules it asks for."""
    wanted = json.loads(request)
    sys.path[:] = wanted["sys_path"]
    for name in wanted["modules"]:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise copy every page that it shares


if REQUEST in os.environ:
    preload(os.environ.pop(REQUEST))
