"""The steps of the how-to pages, carried out as written in a copy of the code."""

import json

from tests.docs.pages import copy_of_the_code, follow


def test_a_backbone_is_one_file(tmp_path):
    folder = copy_of_the_code(tmp_path)
    follow("howto/backbone.md", folder)
    log = [json.loads(line) for line in (folder / "runs/tinynet/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in log) == 2
    assert (folder / "runs/tinynet/final.safetensors").stat().st_size < 1_000_000
