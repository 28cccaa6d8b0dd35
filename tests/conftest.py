"""The environment that DeepSpeed needs on a machine without a GPU, set before it is imported."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from zlib import crc32

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One folder for each virtual environment: what DeepSpeed compiles there names its headers.
_BUILT = f"ckpt-torch-extensions-{crc32(sys.prefix.encode()):08x}"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / _BUILT))
# A build that was killed leaves a lock on which every later run would wait for ever.
for _lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
    if time.time() - _lock.stat().st_mtime > 900:
        _lock.unlink(missing_ok=True)
sys.path.insert(0, str(Path(__file__).parent))
