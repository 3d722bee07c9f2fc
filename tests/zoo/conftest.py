"""Makes the zoo's modules importable as `zoo`: its test modules and benchmarks/zoo_table.py share them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
