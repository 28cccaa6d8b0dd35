"""A training without DeepSpeed,
as the front ends see an engine: FSDP, DDP, or one process.

engine       ``PlainEngine``: the model, the optimizer, and what is to be known of both
sharding     how FSDP cuts up a model, and what each rank holds of it
accelerated  what Accelerate, and so the Trainer, says of such a training
files        the files that such a training saves: whose they are, and whether the states are there
"""
