"""Draw docs/assets/architecture.svg: how images become shards, a detector and a report.

    python docs/figures/architecture.py            # writes the file
    python docs/figures/architecture.py --check    # fails if the file is out of date

Boxes have a fill of their own and everything else is a mid gray, so that the figure is
readable on a light and on a dark page.
"""

import sys
from html import escape
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent.parent / "assets" / "architecture.svg"
WIDTH, HEIGHT = 1000, 372
LINE = "#808791"
DATA, MODEL, RESULT, WORDS = "#37618e", "#5b4a9c", "#1f6f5c", "#8a4b3c"

# (x, y, width, title, detail, package, color)
BOXES = [
    (10, 60, 150, "images", "folder, zip, CSV", "dataio.layouts", DATA),
    (200, 60, 150, "shards", "one codec, manifest", "dataio.sharding", DATA),
    (390, 60, 150, "batches", "order, DALI, crops", "dataio.loading", DATA),
    (580, 60, 150, "backbone", "ResNet, Swin, timm", "models.detector", MODEL),
    (790, 20, 200, "generator head", "P(fake) = 1 - P(nature)", "", MODEL),
    (790, 100, 200, "object head", "what the image shows", "", MODEL),
    (200, 260, 150, "audit", "leaks beside the pixels", "engines.audit", RESULT),
    (390, 260, 150, "TinyLLaVA", "why it is fake, in words", "engines.mlm", WORDS),
    (580, 260, 150, "report", "intervals, Grad-CAM", "engines.report", RESULT),
    (790, 260, 200, "predictions, metrics", "one row for each image", "engines.evaluate", RESULT),
]
BOX_HEIGHT = 56
# Points of each arrow, the last one with a head.
ARROWS = [
    [(160, 88), (200, 88)],
    [(350, 88), (390, 88)],
    [(540, 88), (580, 88)],
    [(730, 88), (760, 88), (760, 48), (790, 48)],
    [(730, 88), (760, 88), (760, 128), (790, 128)],
    [(890, 156), (890, 260)],
    [(790, 288), (730, 288)],
    [(275, 146), (275, 260)],
    [(300, 146), (300, 200), (465, 200), (465, 260)],
]
LABELS = [(880, 212, "end", "both answers"), (475, 232, "start", "questions")]


def draw() -> str:
    """The figure as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>From images to shards, a detector with two heads, metrics and a report</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{LINE}"/></marker></defs>',
    ]
    for points in ARROWS:
        path = " ".join(f"{x} {y}" for x, y in points)
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'
        )
    for x, y, width, title, detail, package, color in BOXES:
        middle = x + width / 2
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="8" fill="{color}"/>')
        parts.append(_text(middle, y + 24, title, 16, "#fff", weight=600))
        parts.append(_text(middle, y + 43, detail, 12, "#f1f3f6"))
        if package:
            parts.append(_text(middle, y + BOX_HEIGHT + 18, package, 12, LINE, family="monospace"))
    parts += [_text(x, y, text, 12, LINE, anchor=anchor) for x, y, anchor, text in LABELS]
    return "\n".join([*parts, "</svg>", ""])


def _text(
    x: float,
    y: float,
    text: str,
    size: int,
    color: str,
    *,
    weight: int = 400,
    anchor: str = "middle",
    family: str = "",
) -> str:
    font = f' font-family="{family}"' if family else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{color}"{font}>{escape(text)}</text>'
    )


def main() -> int:
    """Write the file, or with --check compare it."""
    if sys.argv[1:] == ["--check"]:
        if not OUTPUT.is_file() or OUTPUT.read_text() != draw():
            print(f"{OUTPUT} is out of date: run python docs/figures/architecture.py", file=sys.stderr)
            return 1
        return 0
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(draw())
    return 0


if __name__ == "__main__":
    sys.exit(main())
