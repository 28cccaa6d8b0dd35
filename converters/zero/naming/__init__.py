"""Which tensor of ``module`` belongs to which fp32 tensor, where no file says so.

storage_views      by place: trained tensors are views into flat 16-bit storages
group_storages     the storage that a group lies in, found by size, layout and values
trained_storages   the same where a hook gave them other names
cloned_parameters  by value: trained parameters that a hook copied
name_matching      by order, shape and value
placeholders       by what stage 3 leaves in their place
assemble           all of them, as ``Weights`` in the model's order
"""
