"""The commands, one short file each: parse the flags, call one function of engines, print the result.

`python launch/NAME.py` and `telltale NAME` are the same. Each file has `make_parser`, its argument
parser without side effects, and `main`, which returns the exit code. A file imports what is slow
to import after its arguments are parsed. `shared` holds what several commands share.
"""
