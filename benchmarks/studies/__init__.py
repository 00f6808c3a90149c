"""The studies: a file, or a few, per command that measures more than one experiment's arms.

They import all other packages, and no other package imports them.
"""
