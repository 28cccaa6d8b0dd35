"""The commands that cross between DeepSpeed and others.

dcp   torch's distributed checkpoints, which FSDP loads
"""
