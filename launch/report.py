r"""Write an evaluation's report anew, with whatever else there is by now.

    telltale report --evaluation runs/NAME/evaluation --checkpoint runs/NAME --data data/NAME --split test \
        --protocols runs/NAME/robustness --explainer runs/EXPLAINER

The same page as `evaluate.py --report` writes, from the predictions and metrics that lie in the
folder; --explainer adds what a finetuned TinyLLaVA answered to its benchmarks.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataio.core.log import log
from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("report", __doc__)
    add = parser.add_argument_group("Evaluation").add_argument
    add("--evaluation", required=True, help="folder with predictions.parquet and metrics.json")
    add("--checkpoint", required=True, help="RUN or RUN/best.pt, for the gallery's maps")
    add("--data", required=True, help="folder of the shards that were predicted")
    add("--split", required=True, help="train, val or test")
    add = parser.add_argument_group("Contents of the report").add_argument
    add("--protocols", nargs="*", default=[], help="folders of telltale protocol")
    add("--explainer", default=None, help="run folder of telltale finetune, for its benchmarks")
    add(
        "--explainer-optional",
        action="store_true",
        help="leave the explainer out, with a warning, where it has answered nothing",
    )
    add("--pictures", type=int, default=2, help="per generator and outcome in the gallery; 0: none")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.pictures < 0:
        parser.error(f"--pictures is {options.pictures}, expected 0 or more")

    from engines.report.report import report_evaluation

    explainer = options.explainer
    if explainer and options.explainer_optional and not any(Path(explainer).glob("vqa/*/metrics.json")):
        log.warning(f"{explainer} has answered no benchmark, so the report is without it")
        explainer = None
    page = report_evaluation(
        output=options.evaluation,
        explainer=explainer,
        **{key: options[key] for key in ("checkpoint", "data", "split", "protocols", "pictures")},
    )
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    run_command(main)
