"""``python -m ckpt``, the same as ``ckpt``."""

from ckpt.cli.main import main

main()
