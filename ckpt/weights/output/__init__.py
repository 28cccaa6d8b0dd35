"""The output of a conversion, as values.

product  an output folder decided on
part     further weights in a folder inside it
"""
