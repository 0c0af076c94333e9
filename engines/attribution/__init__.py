"""Attribution maps: where a detector finds evidence, and whether the maps mean anything.

* `gradcam.grad_cams`: Grad-CAM of a verdict, a generator or an object
* `gallery.build_gallery`: the images a detector is surest of, with maps
* `regions.find_regions`: the places of a map that stand out, as boxes
* `faithfulness`: deletion and insertion, compared with random maps
"""
