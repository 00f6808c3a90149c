"""The rows of weights that feed the heads of an attention, whole or sharded.

Facts and declarations only: `discover` finds them, `clip` scales them.
"""
