"""What is run: the text, the model and its training, the arms, and the experiment that puts them together.

Values alone live here, and the one table of arms. Nothing here trains, writes a file or draws.
"""
