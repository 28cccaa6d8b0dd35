"""The meaning of the keys of a state dict for its leaves.

leaves        a leaf, and the keys that lead to it
layouts       which leaves are the model's, which the optimizer's
model_roots   the keys that the model's names follow, where there may be several models
"""
