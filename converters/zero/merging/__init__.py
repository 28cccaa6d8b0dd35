"""Checkpoints of more parallelism than ZeRO, as if ZeRO alone had saved the whole model.

checkpoint       what a checkpoint holds, as trees that can be written again: merged, or as it is
roots            entries of state files that tell of parallelism, as ZeRO alone would have them
agreement        what model-parallel ranks keep alike of a param group
tensor_parallel  the shards of all tensor-parallel ranks, param group by param group
pipeline         the same of all stages;  pipeline_lanes  of stages that are tensor parallel
numbered_group   the param group of a training in fp32 without ZeRO
numbered_pipeline  the same of all stages of a pipeline
tensor_ranks     the whole model cut for tensor-parallel ranks again
experts          the model with the experts of all expert ranks, and without any
expert_parts     the same of ranks that each have experts of their own: shards, or a stage's
expert_ranks     the param groups as each expert rank has them;  whole_groups  with all experts
saved_degrees    how many ranks of each kind, without reading more than that takes
universal_entries  what universal files say of how parameters are cut
reader           which of these a path is; of MiCS the first shard group
"""
