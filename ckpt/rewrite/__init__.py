"""Training states rewritten: for other ranks, another stage, or in the
universal format.

job               moves, proves, commits
result            what was done, as a value
reshard           other ranks or another stage
universal         the universal format and back
universal_limits  what DeepSpeed does not restore from it
"""
