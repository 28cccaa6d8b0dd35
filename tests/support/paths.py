"""Where things lie in the repository, and which folders a worker imports from.

pytest has the same folders in ``pythonpath`` (pyproject.toml); processes that tests start get them
in PYTHONPATH.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
IMPORTED = ("", "tests/support", "tests/workers", "scripts/fixtures", "scripts/kills")
PATHS = [str(ROOT / folder) for folder in IMPORTED]
PYTHONPATH = os.pathsep.join(PATHS)
