"""DeepSpeed ZeRO checkpoints: managed while training, and turned into weights."""

__version__ = "0.1.0"
