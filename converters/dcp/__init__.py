"""torch's distributed checkpoints (DCP), which FSDP, Accelerate, torchtitan and others save.

writing   a training state as one, for stock ``torch.distributed.checkpoint.load``
"""
