"""Data sets on disk as streams of records: one file for each layout, found by name.

* `registry.register_layout`: the decorator by which a file adds a layout.
* `open_layout`: open a data set by its layout's name.
* `Layout`, `Record`: what a layout offers, and what it yields for each image.
* `genimage`, `cifake`, `manifest`, `synthetic`: the layouts that come with telltale.
"""

from dataio.layouts.base import Layout, Record
from dataio.layouts.registry import open_layout

__all__ = ["Layout", "Record", "open_layout"]
