"""Facts about ranks: meshes, process groups, which indices of a tensor a rank holds, what engines wrap around modules.

Nothing here knows Muon or QK-Clip.
"""
