"""URLs given to commands that need a folder: one line that says what to do."""

import pytest

from dataio.core.errors import UserError
from launch import audit, make_vqa, shard
from tests.remote_servers import HttpServer


def test_shards_are_written_to_a_folder_and_the_upload_is_told(tmp_path):
    words = ["--layout", "synthetic", "--source", str(tmp_path / "source"), "--output", "s3://bucket/set"]
    with pytest.raises(UserError, match=r"--output s3://bucket/set: .* aws s3 sync DIR s3://bucket/set"):
        shard.main(words)
    assert list(tmp_path.iterdir()) == []


def test_conversations_need_local_tars(tmp_path):
    with pytest.raises(UserError, match=r"--shards s3://bucket/set: .* copy the shards to a folder first"):
        make_vqa.main(["--shards", "s3://bucket/set", "--output", str(tmp_path / "vqa")])


def test_an_audit_of_a_url_needs_an_output_and_gives_the_same(tiny_shards, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="reading http:// needs aiohttp: pip install 'telltale[http]'")
    monkeypatch.setenv("TELLTALE_CACHE", str(tmp_path / "cache"))
    server = HttpServer(tiny_shards)
    words = ["--sample", "40", "--workers", "1"]
    with pytest.raises(UserError, match=r"http://.* is not written to: give the name of a JSON file"):
        audit.main(["--shards", server.url, *words])
    assert audit.main(["--shards", server.url, *words, "--output", str(tmp_path / "there.json")]) == 0
    assert audit.main(["--shards", str(tiny_shards), *words, "--output", str(tmp_path / "here.json")]) == 0
    assert (tmp_path / "there.json").read_text() == (tmp_path / "here.json").read_text()
    server.shutdown()
    server.server_close()
