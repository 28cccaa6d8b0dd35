"""The layout that ``save_pretrained`` gives to weights,
where a model runs with another one.

stored_copies  copies of weights in a file beside a checkpoint
hub_layout  weights in the layout of the Hub
evidence    whether names are those of a running model or of a file
probing     copies that lie in the layout of the Hub, as the model has them
reverting   which tensors become which
operations  tensors cut, joined and put in another order
patterns    names that are changed by a pattern
table       the rules of a class, from a table that is shipped
framework_layout  names of pipelines, Megatron and AutoEP as the model has them
framework_tables  the tables of these names
"""
