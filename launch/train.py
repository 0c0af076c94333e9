"""Train a dual-head detector of generated images.

    torchrun launch/train.py
    torchrun --nproc-per-node=2 launch/train.py --config configs/resnet18_cifake.yaml --optim.lr 0.05

With nothing else it runs configs/quickstart.yaml and makes its data on first use. The
same command continues a run that was stopped or killed, exactly.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.runtime.command import EXIT_USER_ERROR, SharedError, is_main_process, run_command
from engines.runtime.exit_file import guess_run_folder, previous_exit_code, write_exit
from engines.runtime.paths import CONFIGS

DEFAULT_CONFIG = CONFIGS / "quickstart.yaml"


def main() -> int:
    code = previous_exit_code(sys.argv[1:], DEFAULT_CONFIG)
    if code is not None:
        return code
    # Seconds to import, for which a restarted worker need not wait.
    from engines.config.detector import parse_config
    from engines.runtime.distributed import die_with_launcher
    from engines.runtime.run_log import sweep_run_folder
    from engines.train.loop import run_training

    die_with_launcher()
    try:
        config = parse_config(sys.argv[1:], DEFAULT_CONFIG)
    except UserError as error:
        _report_unparsed(error)
        raise SharedError(str(error)) from None
    config.run.dir = sweep_run_folder(config.run.dir)
    return run_training(config)


def _report_unparsed(error: UserError) -> None:
    folder = guess_run_folder(sys.argv[1:], DEFAULT_CONFIG)
    if is_main_process() and folder is not None and folder.is_dir():
        write_exit(folder, EXIT_USER_ERROR, str(error))


if __name__ == "__main__":
    run_command(main)
