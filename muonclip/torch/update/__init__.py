"""Muon's update over ranks: a plan of who iterates which matrix and which bytes move, and its execution.

Matrices only: parameter groups, options and state are `optimizer`'s, facts about ranks `mesh`'s.
"""
