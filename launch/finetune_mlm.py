"""Finetune TinyLLaVA under DeepSpeed ZeRO to say why an image is fake.

    deepspeed launch/finetune_mlm.py
    deepspeed --num_gpus 4 launch/finetune_mlm.py --config configs/tinyllava_lora_zero2.yaml --optim.lr 1e-4

With nothing else it runs configs/tinyllava_quickstart.yaml: a tiny random model on
conversations it makes itself, on the GPUs there are, else on the CPU (where the launcher
starts one process; --num_gpus 2 starts two). torchrun and plain python start it too. The
same command continues a run that was stopped or killed.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.errors import UserError
from engines.runtime.command import EXIT_USER_ERROR, SharedError, is_main_process, run_command
from engines.runtime.exit_file import guess_run_folder, previous_exit_code, write_exit
from engines.runtime.paths import CONFIGS

DEFAULT_CONFIG = CONFIGS / "tinyllava_quickstart.yaml"


def main() -> int:
    code = previous_exit_code(sys.argv[1:], DEFAULT_CONFIG)
    if code is not None:
        return code
    # Seconds to import, for which a restarted worker need not wait.
    from engines.config.mlm import FinetuneConfig
    from engines.config.parser import parse_as
    from engines.runtime.distributed import die_with_launcher

    die_with_launcher()
    try:
        config = parse_as(FinetuneConfig, sys.argv[1:], DEFAULT_CONFIG)
    except UserError as error:
        folder = guess_run_folder(sys.argv[1:], DEFAULT_CONFIG)
        if is_main_process() and folder is not None and folder.is_dir():
            write_exit(folder, EXIT_USER_ERROR, str(error))
        raise SharedError(str(error)) from None
    if is_main_process():
        print(f"{config.run.dir}: loading DeepSpeed and transformers", flush=True)
    from engines.mlm.finetune import run_finetuning  # seconds to import, which --help need not wait for

    return run_finetuning(config)


if __name__ == "__main__":
    # DeepSpeed's and gloo's threads abort one process in some ("terminate called without an active
    # exception") at the interpreter's end; torchrun then counts a finished run as failed.
    run_command(main, at_once=True)
