r"""Predict images: real, AI-generated or unsure, the likeliest generator, and the object.

    telltale predict --checkpoint runs/quickstart --output predictions.csv photos/ 'more/*.png' archive.zip
    find photos -name '*.jpg' -print0 | telltale predict --checkpoint runs/quickstart --null -

One row for each image, to FILE.csv or FILE.jsonl, else as a table on the screen: path, verdict,
p_fake, generator, p_generator, object, error, calibrated, credentials, warning. A file that cannot be read
has its reason in `error` and stops nothing; the exit code is 2 only if none could be read.
Probability and verdict follow the calibration that telltale calibrate put beside the
checkpoint; without one they are raw, and AI-generated means P(fake) >= 0.5.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import EXIT_USER_ERROR, run_command


def make_parser() -> Parser:
    parser = Parser("predict", __doc__)
    add = parser.add_argument_group("Input and output").add_argument
    add("paths", nargs="+", help="files, folders, 'globs', zips, or - for a list on standard input")
    add("--checkpoint", required=True, help="RUN, RUN/best.pt or an export")
    add("--output", help="FILE.csv or FILE.jsonl (default: a table on the screen)")
    add("--explain", help="folder for each image as seen, its Grad-CAM map, and both in one")
    add("--max-megapixels", type=int, help="refuse larger images (default: as in the training shards, 200)")
    add("--null", action="store_true", help="the list ends its names with zero bytes")
    add = parser.add_argument_group("Speed").add_argument
    add("--batch", type=int, default=None, help="images per forward pass")
    add("--workers", type=int, default=0, help="threads that read (default: the cores)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch is {options.batch}, expected at least 1")
    if options.workers < 0:
        parser.error(f"--workers is {options.workers}, expected at least 1, or 0 for the cores")

    if options.max_megapixels is not None and options.max_megapixels < 1:
        parser.error(f"--max-megapixels is {options.max_megapixels}, expected at least 1")

    from engines.predict.predict import check_predictions_path

    if options.output:
        check_predictions_path(options.output)
    import torch

    from dataio.core.cores import cores_per_process
    from dataio.sources.inputs import find_inputs
    from engines.predict.detector import Detector
    from engines.predict.predict import run_predict

    torch.set_num_threads(cores_per_process())
    detector = Detector(options.checkpoint, options.batch, options.max_megapixels)
    if detector.calibration is None:
        print(
            "not calibrated: verdicts are P(fake) >= 0.5; see telltale calibrate",
            file=sys.stderr,
            flush=True,
        )
    inputs = find_inputs(options.paths, sys.stdin.buffer, null=options.null)
    workers = options.workers or cores_per_process()
    counts = run_predict(detector, inputs, workers=workers, output=options.output, explain=options.explain)
    if options.output:
        print(f"{counts}\nresults: {options.output}")
    if not counts.read:
        print(f"error: no image could be read; first {counts.first_error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    run_command(main)
