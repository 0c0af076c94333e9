"""A run's command: one rank under a launcher, else the command that starts the ranks."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataio.core.errors import UserError
from engines.config.parser import Parser, make_parser, parse_as
from engines.runtime.command import SharedError, is_main_process
from engines.runtime.exit_file import previous_exit_code, report_unparsed
from engines.runtime.launcher import count_processes, launch_processes, under_launcher
from launch.shared.planned import PLANNED, add_planned_flags, planned_machine

if TYPE_CHECKING:
    from engines.runtime.machine import Machine


@dataclass(frozen=True)
class RunCommand:
    """A command that trains.

    Attributes:
        name: as in `telltale train`. doc: its module's docstring.
        kind: imports and returns the configuration's class.
        run: does one rank's work with the configuration; returns the exit code.
        plan: says what (configuration, machine, images/s of a process or None) would do.
        fits: whether (configuration, processes) can share the batch.
        sweep: whether a run of a W&B sweep goes into a folder below the configuration's.
    """

    name: str
    doc: str | None
    script: Path
    default_config: Path
    kind: Callable[[], type]
    run: Callable[[Any], int]
    plan: "Callable[[Any, Machine, float | None], str]"
    fits: Callable[[Any, int], bool]
    sweep: bool = False

    def make_parser(self) -> Parser:
        """The parser with the complete help."""
        parser = make_parser(self.kind(), self.name, self.doc)
        group = parser.add_argument_group("Processes on this machine")
        group.add_argument(
            "--gpus",
            metavar="N|all",
            help="start one process for each of N GPUs; all is the default of `telltale`, and one process on "
            "the CPU where there is no GPU. Not under torchrun, deepspeed or srun, which start the processes",
        )
        group.add_argument("--processes", type=int, metavar="N", help="start N processes, also without GPUs")
        add_planned_flags(parser.add_argument_group("Plan without running"))
        return parser


def run_or_launch(command: RunCommand, argv: Sequence[str], gpus: str | None) -> int:
    """Do one rank's work, or start the ranks and wait for them.

    Args:
        gpus: the default of --gpus; None is this process alone.

    Returns:
        0 finished, 2 user error of a started rank, 75 stopped and saved.

    Raises:
        UserError: in this process; one of a started rank is printed there, and 2 returned.
    """
    if (code := previous_exit_code(argv, command.default_config)) is not None:
        return code
    if "--help" in argv or "-h" in argv:
        command.make_parser().parse_args(["--help"])
    options, flags = _split_process_flags(argv)
    if options.dry_run:
        return _say_plan(command, options, flags, gpus)
    for name in PLANNED:
        if getattr(options, name) is not None:
            raise UserError("only with --dry-run", field=name, value=getattr(options, name))
    if under_launcher():
        if options.gpus is not None or options.processes is not None:
            raise UserError("--gpus, --processes: a launcher has started this process already; remove them")
        return _run_rank(command, flags)
    if options.gpus is not None and options.processes is not None:
        raise UserError("--gpus and --processes: give one of them")
    if options.processes is not None and options.processes < 1:
        raise UserError("expected 1 or more", field="processes", value=options.processes)
    chosen = options.gpus or gpus
    if chosen not in (None, "all") and not (chosen.isdecimal() and int(chosen) > 0):
        raise UserError("expected all, or a number from 1 on", field="gpus", value=chosen)
    if options.processes == 1 or (options.processes is None and chosen is None):
        return _run_rank(command, flags)
    config = _parse(command, flags)
    count = options.processes or count_processes(chosen or "all", lambda n: command.fits(config, n))
    if count == 1:
        return command.run(config)
    return launch_processes(command.script, flags, count, Path(config.run.dir))


def _say_plan(
    command: RunCommand, options: argparse.Namespace, flags: Sequence[str], gpus: str | None
) -> int:
    """Print what the command would do; under a launcher, its first process does."""
    if not is_main_process():
        return 0
    config = _parse(command, flags, reports=False)
    machine = planned_machine(options, options.gpus or gpus, lambda n: command.fits(config, n))
    print(command.plan(config, machine, options.rate), flush=True)
    return 0


def _split_process_flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus")
    parser.add_argument("--processes", type=int)
    add_planned_flags(parser)
    names = ["--gpus", "--processes", "--dry-run", "--nodes", "--rate", "--gpu-memory"]
    for word in argv:
        name = word.partition("=")[0]
        close = difflib.get_close_matches(name, names, 1, 0.8)
        if close and name != close[0]:
            raise UserError(f"unrecognized arguments: {name}; did you mean {close[0]}? (see --help)")
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from None


def _run_rank(command: RunCommand, flags: Sequence[str]) -> int:
    from engines.runtime.distributed import die_with_launcher

    die_with_launcher()
    return command.run(_parse(command, flags))


def _parse(command: RunCommand, flags: Sequence[str], *, reports: bool = True) -> Any:
    from engines.runtime.run_log import sweep_run_folder

    try:
        config: Any = parse_as(command.kind(), flags, command.default_config)
    except UserError as error:
        if is_main_process() and reports:
            report_unparsed(error, flags, command.default_config)
        raise SharedError(error.for_command_line()) from None
    if command.sweep:
        config.run.dir = sweep_run_folder(config.run.dir)
    return config


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The arguments of a command: those given, else the process's own."""
    return list(sys.argv[1:] if argv is None else argv)
