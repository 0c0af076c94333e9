"""Benchmarks: telltale and common alternatives, interleaved, each case in a process of its own.

* `case.Group, Run, Result`: what a benchmark consists of
* `harness.run_group`: time the cases of a group
* `registry.GROUPS`: all groups by name, from cases_*.py
* `peers_*`: the alternatives
* `document`: results as JSON and tables, and regressions
* `goals, memory, roofline`: the project's goals, memory by number of files, a device's peak rates
"""
