"""Benchmarks: telltale and common alternatives, interleaved, each case in a process of its own.

* `case.Group, Run, Result`: what a benchmark consists of
* `harness.run_group`: time the cases of a group
* `registry.GROUPS`: all groups by name, from cases_*.py
* `peers_*`: the alternatives
* `document`: results as JSON and tables, and regressions
* `check_run.run_check`: the GPU check: its parts (`check_parts`), each in a process (`check_child`)
* `goals`: the goals of one GPU, and which of them a check has met
* `memory, roofline`: memory by number of files, a device's peak rates
"""
