"""Experiments as values: the text, the model and its training, the arms, and the experiment that puts them together.

The one table of arms is here. Nothing here trains, writes a file or draws.
"""
