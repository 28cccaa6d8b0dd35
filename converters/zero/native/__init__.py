"""DeepSpeed's own state files for another world size or stage.

reshard          the plan of all files
target           the topology that they are made for
optimizer_files  what an optimizer file holds
model_files      what a model file holds
limits           what is refused
expert_files     the plan of all files of a checkpoint of experts;  expert_proof  its proof
expert_ranks     what each expert rank has;  expert_trees  in its optimizer file
expert_entries   what model files say of AutoEP;  folding  and files of AutoEP with AutoTP
pipeline_files   the files of a pipeline;  pipeline_proof  their proof
stages           the layers of its stages
unpartitioned_files   those of fp32 without ZeRO
proof            the files read again and compared with the source
"""
