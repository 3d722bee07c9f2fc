"""Failures on demand: TRTSIM_FAIL=build,enqueue. SIMULATED.

`build`: no plan; `deserialize`: no engine from a plan; `context`: no execution context; `enqueue`: refused;
`device`: an illegal access, found at the next synchronisation; `no_int8`: hardware without INT8.
"""

from __future__ import annotations

import os


def wanted(name: str) -> bool:
    return name in os.environ.get("TRTSIM_FAIL", "").split(",")
