"""The detector: a backbone with two heads, one names the generator and one the object.

* `dual_head.DualHead` is the network, `dual_head.dual_head_loss` its loss; `config.ModelConfig` its options.
* `backbones` has a file for each family of backbones, and builds one by name.
* `norms` has ghost batch norm, plain and as fused kernels.
* `weights.load_weights` loads initial weights from files and libraries.
* `flops.training_flops` counts an image's arithmetic.
"""
