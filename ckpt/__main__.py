"""``python -m ckpt``, the same as ``ckpt``."""

from ckpt.cli import main

main()
