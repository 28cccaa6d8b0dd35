"""Checkpoints looked at: what their numbers are like, and how two of them differ.

contents     the tensors of a checkpoint, weights or optimizer states, by name
statistics   ``ckpt stats``: the numbers of each tensor
matching     the names that two checkpoints have in common
comparison   ``ckpt diff``: how far their tensors are from each other
"""
