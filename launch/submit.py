r"""Submit a configuration to Slurm: the right script, with the options of your site.

    telltale submit configs/resnet50_genimage_4096.yaml --nodes 4 --time 4:00:00
    telltale submit configs/tinyllava_lora_zero2.yaml --partition gpu --dry-run

Options that are not given come from slurm/site.env (see slurm/site.env.example); dotted flags go
to the training. --dry-run shows the command and what it would do, as `telltale train --dry-run` does, and
writes nothing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path[0] = str(ROOT)

from engines.config.parser import Parser, split_known_flags
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("submit", __doc__)
    add = parser.add_argument_group("Experiment").add_argument
    add("experiment", help="YAML file of a detector or of a finetuning run, see configs/")
    add = parser.add_argument_group("Resources").add_argument
    add("--nodes", type=int, default=1, help="nodes of the job")
    add("--gpus", type=int, default=None, help="GPUs of each node (default: the whole node with all of them)")
    add("--cpus", type=int, default=None, help="with --gpus: CPUs of each node")
    add("--mem", default=None, help="with --gpus: memory of each node, such as 64G")
    add(
        "--time",
        default=None,
        help="limit of one attempt, such as 12:00:00; the run is requeued and continues",
    )
    add = parser.add_argument_group("Site").add_argument
    add("--partition", default=None, help="partition")
    add("--account", default=None, help="account")
    add("--qos", default=None, help="quality of service")
    add("--constraint", default=None, help="features of the nodes")
    add(
        "--sbatch",
        default="",
        help='other options of sbatch, in one word: --sbatch="--exclude=n3 --mail-type=END"',
    )
    add = parser.add_argument_group("Submission").add_argument
    add(
        "--dry-run", action="store_true", help="show the command, the plan of the run and what its checks say"
    )
    add(
        "--node-gpus",
        type=int,
        default=8,
        help="with --dry-run and without --gpus: GPUs of a whole node, 0 for one process on the CPU",
    )
    add("--rate", type=float, default=None, help="with --dry-run: images (conversations) per second of a GPU")
    add("--gpu-memory", type=float, default=None, help="with --dry-run: memory of a GPU, GiB (default: any)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command_words, flags = split_known_flags(words)
    options = make_parser().parse_args(command_words)

    from engines.cluster.submit import Request, command_of, explain, plan_job, read_site, submit

    request = Request(
        **{key: options[key] for key in Request.__dataclass_fields__ if key != "flags"}, flags=tuple(flags)
    )
    site = read_site(ROOT)
    gres = os.environ.get("TELLTALE_GRES", site.get("TELLTALE_GRES", ""))
    command = command_of(request, ROOT, gres)
    if options.dry_run:
        print(explain(command, site), flush=True)
        print(plan_job(request, ROOT, options.node_gpus, options.rate, options.gpu_memory))
    else:
        print(submit(command, request, ROOT, site))
    return 0


if __name__ == "__main__":
    run_command(main)
