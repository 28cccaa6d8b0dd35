"""Where DeepSpeed builds its extensions in tests, and with which compiler.

As many variables as nobody has set: a compiler of one's own is used as it is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from zlib import crc32

COMPILER = Path(__file__).with_name("compiler") / "g++"


def environment() -> dict[str, str]:
    """CXX and TORCH_EXTENSIONS_DIR, as they are set or as tests have them."""
    ours = str(COMPILER) if os.access(COMPILER, os.X_OK) else "c++"
    compiler = os.environ.get("CXX", ours)
    # One folder for each virtual environment and compiler: what is built there names both.
    name = f"ckpt-torch-extensions-{crc32(f'{sys.prefix} {compiler}'.encode()):08x}"
    folder = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / name))
    return {"CXX": compiler, "TORCH_EXTENSIONS_DIR": folder}
