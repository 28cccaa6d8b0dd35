"""Does the output load? Its names and shapes against those that its reader wants.

verdict     what a reader will make of an output
audience    whose names are known: of the 16-bit weights beside, of transformers' classes
table       the classes of transformers;  fields  what their configurations decide
entries     the files of both
renames     the names that from_pretrained gives to tensors as it reads them
fitting     names against a tree of names: a fit;  lengths  how long lists of layers are
inner_models  prefixes below which a reader's own names stand
losses      what of the weights would not be read
unknown     what can be said where no class is known
embeddings  the vocabulary's rows;  untying  tied weights that differ
modular     the modules of sentence-transformers
installed   the same question put to the installed transformers
"""
