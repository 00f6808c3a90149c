"""Which rows of which weights feed which heads of an attention, whole or sharded.

Facts and declarations only: `discover` finds them, `clip` scales them.
"""
