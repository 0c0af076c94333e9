r"""Check a job's nodes before any time is spent: one task on each, in the batch scripts of slurm/.

    srun --ntasks-per-node=1 telltale preflight --script launch/train.py \
        --gpu-config configs/resnet50_genimage.yaml --cpu-config configs/quickstart.yaml \
        --names n1,n2 --head n1 --port 30001 -- --optim.lr 0.05

The nodes compare versions, GPUs, data, run folder, free disk and clocks, and time a small
all-reduce. A node that differs is named, and the job ends with code 2. Standard output is three
lines for the script: run folder, processes per node, and the configuration that is taken where
none was given ("" where one was); the table goes to standard error.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path[0] = str(ROOT)

from dataio.core.errors import UserError
from engines.config.parser import Parser
from engines.runtime.command import run_command
from engines.runtime.exit_file import report_unparsed

NONE = "-"


def make_parser() -> Parser:
    parser = Parser("preflight", __doc__)
    add = parser.add_argument_group("Command").add_argument
    add(
        "--script", choices=["launch/train.py", "launch/finetune_mlm.py"], required=True, help="what will run"
    )
    add("--gpu-config", required=True, help="configuration where there are GPUs and the flags name none")
    add("--cpu-config", required=True, help="the same where there are none")
    # From the script: a container may have no scontrol, or one that looks for its cluster for a minute.
    add = parser.add_argument_group("Nodes").add_argument
    add("--names", default="", help="all nodes' names in Slurm's order, with commas (default: this machine)")
    add("--head", default="localhost", help="the first node's name")
    add("--port", type=int, default=30000, help="a free port there")
    add("--need-gpu", action="store_true", help="refuse nodes without a GPU")
    add("--timeout", type=int, default=120, help="seconds to wait for a node")
    add("--processes", type=int, default=None, help="per node (default: one for each GPU, else one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    command_words, rest = (
        (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    )
    options = make_parser().parse_args(command_words)

    from engines.cluster.preflight import (
        Chosen,
        Node,
        Place,
        check_nodes,
        choose_run,
        format_nodes,
        look,
        processes_per_node,
    )

    place = Place(
        number=int(os.environ.get("SLURM_NODEID", "0")),
        names=options.names.split(",") if options.names else [socket.gethostname()],
        head=options.head,
        port=options.port,
        timeout=options.timeout,
    )
    default = ROOT / options.cpu_config

    def look_here() -> tuple[Chosen, Node]:
        configs = {"gpu_config": options.gpu_config, "cpu_config": options.cpu_config}
        try:
            chosen = choose_run(options.script, rest, **configs, root=ROOT)
        except UserError as error:
            if place.is_head:
                report_unparsed(error, rest, default)
            raise
        node = look(place.name, chosen, ROOT)
        if options.need_gpu and node.gpus == 0:
            problem = (
                f"no GPU on {place.name}: ask for one (--partition or SBATCH_PARTITION of GPU nodes, --gpus-per-node), "
                "or unset TELLTALE_NEED_GPU to compute on the CPU"
            )
            if place.is_head:
                report_unparsed(UserError(problem), rest, default)
            raise UserError(problem)
        return chosen, node

    chosen, nodes = check_nodes(place, look_here)
    if place.is_head:
        print(format_nodes(nodes, chosen), file=sys.stderr, flush=True)
        processes = options.processes or processes_per_node(nodes[0])
        print(f"{chosen.run}\n{processes}\n{chosen.default_config or NONE}")
    return 0


if __name__ == "__main__":
    run_command(main)
