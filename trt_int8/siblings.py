"""Makes sure that `calibrators` and `engines` are this project's own.

Both names are common: another distribution may have overwritten them, or a folder of that name may lie in the current
directory, ahead of the installed packages.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from trt_int8 import __version__

NAMES = ("calibrators", "engines")


def check(names: tuple[str, ...] = NAMES) -> None:
    """Check that each package lies beside `trt_int8`.

    Raises:
        ImportError: a name resolves to something else.
    """
    home = Path(__file__).resolve().parent.parent
    for name in names:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec is not None and spec.origin is not None else None
        expected = home / name
        if found != expected:
            raise ImportError(
                f"trt-int8 {__version__} cannot start: the package {name!r} resolves to {found or 'nothing'}; expected "
                f"{expected}. Another project owns that name here: install trt-int8 in an environment of its own, or "
                "start it from another folder."
            )
