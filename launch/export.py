r"""Export a checkpoint as safetensors, ONNX, or the published TinyLLaVA.

    telltale export --checkpoint runs/quickstart/best.pt --output exported

--format detector writes exported/model.safetensors and exported/config.json (architecture, label spaces,
preprocessing, codec policy), and exported/model.calibration.json where telltale calibrate has
calibrated the checkpoint. telltale evaluate takes the folder as a checkpoint, and
gives the same predictions bit for bit.

    telltale export --format onnx --checkpoint runs/quickstart/best.pt --output onnx

--format onnx writes onnx/model.onnx for ONNX Runtime, compared with PyTorch before it is kept.

    telltale export --format tinyllava --checkpoint runs/tinyllava/model --output published

--format tinyllava writes a finetuned TinyLLaVA with the names of the published checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engines.config.parser import Parser
from engines.runtime.command import run_command


def make_parser() -> Parser:
    parser = Parser("export", __doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="RUN/best.pt, a file of RUN/checkpoints/, or RUN/final.safetensors; tinyllava: RUN/model",
    )
    parser.add_argument("--output", required=True, help="folder of the export")
    parser.add_argument(
        "--format", choices=["detector", "onnx", "tinyllava"], default="detector", help="what it is"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.format == "tinyllava":
        return _export_tinyllava(options.checkpoint, options.output)
    if options.format == "onnx":
        return _export_onnx(options.checkpoint, options.output)
    from engines.checkpoint.export_format import EXPORT_CALIBRATION, EXPORT_SETTINGS, EXPORT_TENSORS
    from engines.export.to_safetensors import export_checkpoint

    folder = export_checkpoint(options.checkpoint, options.output)
    files = [folder / name for name in (EXPORT_TENSORS, EXPORT_SETTINGS, EXPORT_CALIBRATION)]
    print(f"exported: {', '.join(str(file) for file in files if file.exists())}")
    return 0


def _export_onnx(checkpoint: str, output: str) -> int:
    from engines.export.to_onnx import GRAPH, export_onnx

    folder, difference = export_onnx(checkpoint, output)
    print(f"exported: {folder / GRAPH}; ONNX Runtime's logits differ from PyTorch's by {difference:.1e}")
    return 0


def _export_tinyllava(checkpoint: str, output: str) -> int:
    from engines.export.to_tinyllava import export_tinyllava

    files = export_tinyllava(checkpoint, output)
    print(f"exported: {', '.join(map(str, files))}")
    return 0


if __name__ == "__main__":
    run_command(main)
