r"""Explain single images: the detector's verdict, where it looked, and a language model's words.

    telltale explain --checkpoint runs/quickstart/best.pt --model runs/tinyllava/model \
        --output page.html image.jpg other.png

An image that cannot be read is reported, and the others are explained; the exit code is 2 only
if none could be read. The language model does not see the detector's verdict unless
--tell-verdict is given, and the page says which.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.atomic import write_text
from dataio.core.errors import UserError, writing
from engines.config.parser import Parser
from engines.runtime.command import EXIT_USER_ERROR, run_command

FORMATS = {".html": "html", ".json": "json", ".txt": "text"}


def make_parser() -> Parser:
    parser = Parser("explain", __doc__)
    add = parser.add_argument_group("Input and output").add_argument
    add("images", nargs="+", help="image files")
    add("--checkpoint", help="detector: RUN/best.pt or an export")
    add("--model", help="language model: RUN/model of telltale finetune")
    add("--output", help="FILE.html, FILE.json or FILE.txt; text on the screen by default")
    add("--max-megapixels", type=int, help="refuse larger images (default: as in the training shards, 200)")
    add = parser.add_argument_group("Explanation").add_argument
    add("--tell-verdict", action="store_true", help="give the detector's verdict to the language model")
    add("--no-cam", action="store_true", help="no Grad-CAM")
    add("--device", default="auto", help="of the language model: auto, cpu, cuda or cuda:N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.output and Path(args.output).suffix not in FORMATS:
        raise UserError(f"--output {args.output}: expected a name that ends in {', '.join(FORMATS)}")
    if args.max_megapixels is not None and args.max_megapixels < 1:
        raise UserError("expected at least 1", field="max_megapixels", value=args.max_megapixels)
    from engines.mlm.vqa_benchmark import choose_device, load_for_answers
    from engines.predict.explain import as_html, as_json, as_text, explain_images

    answerer = load_for_answers(args.model, 1, choose_device(args.device)) if args.model else None
    explanations = explain_images(
        args.images,
        args.checkpoint,
        answerer,
        tell=args.tell_verdict,
        cam=not args.no_cam,
        max_megapixels=args.max_megapixels,
    )
    kind = FORMATS[Path(args.output).suffix] if args.output else "text"
    if kind == "html":
        text = as_html(explanations, checkpoint=args.checkpoint, model=args.model, tell=args.tell_verdict)
    else:
        text = as_json(explanations) if kind == "json" else as_text(explanations)
    if args.output:
        with writing(args.output, field="output", hint=""):
            write_text(Path(args.output), text)
        print(f"written: {args.output}")
    else:
        print(text, end="")
    errors = [explanation.error for explanation in explanations if explanation.error]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return EXIT_USER_ERROR if len(errors) == len(explanations) else 0


if __name__ == "__main__":
    run_command(main)
