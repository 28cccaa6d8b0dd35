"""One job saves into a folder at a time.

lease       taken at the start of a training, renewed, given up
lease_file  the file that says who has it
watch       whether its job still lives
processes   a process of some machine
"""
