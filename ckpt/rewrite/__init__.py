"""Training states rewritten: for other ranks, another stage, or in the
universal format.

job               moves, proves, commits
records           its manifest, or what else says what it was made of
result            what was done, as a value
reshard_command   the command line that a message names
reshard           other ranks or another stage
universal         the universal format and back
universal_limits  what DeepSpeed does not restore from it
"""
