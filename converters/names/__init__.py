"""Names of tensors: chosen, changed, and mapped onto each other.

selection     the same weights under other names, or some of them
substitution  a user's regular expressions, in bounded time
rules         one rule that maps names of the state dict to those of the parameters
"""
