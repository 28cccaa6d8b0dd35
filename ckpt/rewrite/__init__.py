"""Training states rewritten:
for other ranks, another stage, or in another format.

job               moves, proves, commits
dcp               torch's distributed checkpoints, which FSDP loads, and back
dcp_for_engine    back, for an engine that is to go on from one
crossing          moves, proves, commits these
crossing_proofs   what proves them
state_work        the bytes that these move, by one process or by several
output_folder     where the output of these may lie, and what is copied into it
records           its manifest, or what else says what it was made of
result            what was done, as a value
reshard_command   the command line that a message names
reshard           other ranks or another stage
targets           which topology a user means, and its files
heads             whether tensor-parallel ranks can share those of a model
universal         the universal format and back
universal_limits  what DeepSpeed does not restore from it
"""
