r"""Export a checkpoint as safetensors and a JSON description.

    python launch/export.py --checkpoint runs/quickstart/best.pt --output exported

Writes exported/model.safetensors and exported/config.json (architecture, label spaces,
preprocessing, codec policy). launch/evaluate.py takes the folder as a checkpoint, and
gives the same predictions bit for bit.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.command import Parser, run_command
from engines.export import SETTINGS, TENSORS, export_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description="Export a checkpoint as safetensors and a JSON description.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="RUN/best.pt, a file of RUN/checkpoints/, or RUN/final.safetensors",
    )
    parser.add_argument("--output", required=True, help="folder of the export")
    options = parser.parse_args(argv)
    folder = export_checkpoint(options.checkpoint, options.output)
    print(f"exported: {folder / TENSORS}, {folder / SETTINGS}")
    return 0


if __name__ == "__main__":
    run_command(main)
