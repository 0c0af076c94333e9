r"""Turn a data set into WebDataset shards with a manifest, or verify such a folder.

    telltale shard --layout genimage --source GenImage --output data/genimage \
        --val-labels LOC_val_solution.csv --workers 16
    telltale shard verify data/genimage

Images for a trained detector are coded as its training images with --codec.from RUN.

Killed at any moment and run again, it continues and ends with the same bytes. On a cluster,
the same command with --task i/n (i from 0, as SLURM's --array=0-7 counts) on a shared file
system writes each n-th shard; when all tasks are done, the same with --finish merges.

    sbatch --array=0-7 ... telltale shard ... --task $SLURM_ARRAY_TASK_ID/8
    telltale shard ... --finish
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.cores import worker_count
from dataio.core.errors import UserError
from dataio.core.tasks import parse_task
from dataio.images.codec import PRESETS, CodecPolicy, preset_policy
from dataio.images.opening import MEGAPIXELS
from dataio.sources.remote_path import is_url, upload_command
from engines.config.layout_flags import add_layout_flags, default_codec_preset, layout_of, layout_settings
from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("shard", __doc__)
    add_layout_flags(parser, required=True, skipped="set files that fit no pattern aside in rejected.csv")
    add = parser.add_argument_group("Shards").add_argument
    add("--output", required=True, help="folder of the shards")
    add("--workers", type=int, help="processes (default: the cores); the bytes do not depend on it")
    add("--samples-per-shard", type=int, default=1000, help="images in one tar")
    add("--codec.preset", choices=PRESETS, default=None, help="default: default; cifake: keep")
    add("--codec.size", type=int, default=None, help="side of the images, pixels (default 256)")
    add(
        "--codec.from",
        metavar="RUN",
        default=None,
        help="instead: the codec policy of a run, checkpoint, export or shard folder, its JPEG history included",
    )
    add("--codec.max_megapixels", type=int, default=None, help=f"reject larger images (default {MEGAPIXELS})")
    add("--seed", type=int, default=0, help="seed of the permutation")
    add("--allow-duplicates", action="store_true", help="accept an image that is in two splits")
    add("--allow-one-class", action="store_true", help="accept a set without photographs, or without fakes")
    add("--synthetic.images", type=int, default=3000, help="synthetic: how many to draw")
    add("--synthetic.size", type=int, default=64, help="synthetic: side, pixels")
    add("--synthetic.seed", type=int, default=0, help="synthetic: seed of the drawing")
    add = parser.add_argument_group("Several machines").add_argument
    add("--task", metavar="i/n", help="write only share i of n, i from 0 to n-1; shares may run at once")
    add("--finish", action="store_true", help="merge what the tasks wrote, or name the tasks still missing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return _verify(words[1:]) if words[:1] == ["verify"] else _write(make_parser().parse_args(words))


def _write(args: Any) -> int:
    from dataio.layouts.synthetic import write_synthetic
    from dataio.sharding.job import ShardJob, finish_job, run_array_task, run_job
    from dataio.sharding.merge import summary

    if is_url(args.output):
        raise UserError(
            f"--output {args.output}: shards are written to a folder; write them there, then upload it, its "
            f"manifest.json last: {upload_command(args.output)}"
        )
    array_task = parse_task(args.task, finish=args.finish)
    policy = _policy(args)
    if args.layout == "synthetic":
        write_synthetic(args.source, **args.synthetic.as_dict())
    layout = layout_of(args)
    for note in layout.notes:
        print(f"note: {note}", file=sys.stderr)
    job = ShardJob(
        layout,
        Path(args.output),
        policy,
        workers=worker_count(args.workers),
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        extra_settings=layout_settings(args),
        allow_duplicates=args.allow_duplicates,
        allow_one_class=args.allow_one_class,
    )
    if array_task is not None:
        print(run_array_task(job, array_task))
    else:
        print(summary(finish_job(job) if args.finish else run_job(job)))
        print(f"shards: {args.output}")
    return 0


def _policy(args: Any) -> CodecPolicy:
    """The codec policy that the flags ask for."""
    source, limit = args["codec.from"], args["codec.max_megapixels"]
    if source is None:
        preset = args.codec.preset or default_codec_preset(args.layout)
        return preset_policy(preset, args.codec.size, MEGAPIXELS if limit is None else limit)
    given = [f"--codec.{name}" for name in ("preset", "size", "max_megapixels") if args[f"codec.{name}"]]
    if given:
        raise UserError(
            f"brings the whole policy; leave out {' and '.join(given)}", field="codec.from", value=source
        )
    from engines.checkpoint.contract import policy_from  # imports torch

    return policy_from(source)


def _verify(words: list[str]) -> int:
    parser = Parser("shard verify", "Check every hash, index, key and image of a shard folder.")
    parser.add_argument("folder", help="folder written by telltale shard")
    parser.add_argument("--workers", type=int, help="processes (default: the cores)")
    args = parser.parse_args(words)
    from dataio.sharding.verify import require_intact

    checked = require_intact(args.folder, workers=worker_count(args.workers))
    print(f"{args.folder}: {checked} images, every hash, index, key and image in order")
    return 0


if __name__ == "__main__":
    run_command(main)
