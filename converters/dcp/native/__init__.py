"""A checkpoint of FSDP or DCP as DeepSpeed's native files, for any ranks and stage.

training       what of it becomes ZeRO's: groups, buffers, frozen parameters, the step
roots          what DeepSpeed's files hold, as trees
files          these files, planned
"""
