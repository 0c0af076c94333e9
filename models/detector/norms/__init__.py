"""Batch norm over ghost batches: several units of statistics in one forward pass, fused on a GPU.

* `ghost_norm.use_ghost_norms`: gives a network these norms and the blocks that use them; names are unchanged.
* `ghost_norm.set_ghosts`: how many ghost batches the coming passes hold.
* `ghost_modules.GhostBatchNorm2d`: normalizes, adds a residual and applies an activation; plain PyTorch or Triton.
* `fused_norm`: the Triton path, one function for training and one for evaluation; kernels in `fused_kernels`.
* `fused_pool.fused_max_pool`: ResNet's max pooling, with kernels in `pool_kernels`.
* `traffic.norm_traffic`: the bytes and launches of a network's norms, counted.
* `fused_blocks`: the blocks of ResNet and cifarnet that leave addition and activation to the norm.
"""
