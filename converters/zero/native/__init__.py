"""DeepSpeed's own state files for another world size or stage.

reshard          the plan of all files
target           the topology that they are made for
optimizer_files  what an optimizer file holds
model_files      what a model file holds
limits           what is refused
proof            the files read again and compared with the source
"""
