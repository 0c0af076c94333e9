"""Typed configurations, their YAML files and their flags; the only package of engines that parses arguments.

* `parser`: `Parser`, the argument parser of every command, with suggestions; `make_parser` and
  `parse_as` for a configuration's class; `parse_int_list`, `split_known_flags`.
* `detector`: `Config` of a detector's training run and its sections; `parse_config`, `from_dict`.
* `mlm`: `FinetuneConfig` of a finetuning run of TinyLLaVA.
* `protocol`: `ProtocolConfig`; `parse_command` reads a protocol's command line.
* `base`: `RunConfig`, which both kinds of runs have.
* `values`: a configuration as plain values; `changed_keys` between two; `FREE_KEYS`.
* `yaml_file`: `check_config_file`, what a YAML file must be before a parser reads it.
* `layout_flags`: the flags of a data set's layout, shared by shard and audit.

No module here imports PyTorch, so that every --help is quick.
"""
