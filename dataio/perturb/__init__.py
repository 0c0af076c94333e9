"""Degraded and shortcut-free versions of images, for the robustness and aligned protocols.

Public names:
    `degradations.Operation`, `degradations.degrade`: compression, scaling, blur, noise, crops.
    `aligned_views`: views in which photographs and generated images have the same history.
    `originals.choose_originals`: the images of a protocol, the same in every cell.
"""
