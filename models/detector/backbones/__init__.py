"""Backbones by name, one file for each family; a new file in this folder is found by itself.

* `registry.register_backbone`: the decorator by which a file adds a network.
* `registry.check_backbone`, `registry.build_backbone`: validate a name; build the network without a classifier.
* `registry.backbone_names`: all names, for messages and documentation.
* `torchvision_nets`, `timm_nets`, `cifarnet`: the families that come with telltale.
"""
