"""Shards behind a URL: the same bytes as from a folder, whatever happens to the network and the server."""

import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from dataio.core.errors import UserError
from dataio.loading.config import DataConfig
from dataio.loading.training_order import TrainingOrder, training_specs
from dataio.sharding.verify import verify_shards
from dataio.shards import shard_table
from dataio.shards.local_cache import CacheOptions
from dataio.shards.manifest import read_manifest
from dataio.shards.remote_cache import CACHE_VARIABLE
from dataio.shards.shard_set import ShardSet
from dataio.sources import remote_path
from dataio.sources.remote_path import EXTRAS, RemotePath, upload_command
from engines.audit.sample import _read_sample, open_splits, refs_of_shards
from engines.train.schedule import data_fingerprint
from tests.remote_servers import HttpServer, Proxy, S3Server, forget_clients, free_port, listens, point_s3_at
from tests.support import environment, wait_until, write_tiny_shards

PATIENCE = 60.0  # seconds that a test waits for another process or a server


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_path, "PART", 16 << 10)  # several of each tiny shard
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "default-cache"))


@pytest.fixture
def bucket(tiny_shards, tmp_path):
    """The folder on the server's disk."""
    shutil.copytree(tiny_shards, tmp_path / "disk" / "bucket" / "set")
    return tmp_path / "disk" / "bucket" / "set"


@pytest.fixture
def server(bucket, monkeypatch):
    server = S3Server(bucket.parent.parent)
    point_s3_at(monkeypatch, server.port)
    yield server
    server.kill()


@pytest.fixture
def web(bucket):
    pytest.importorskip("aiohttp", reason="reading http:// needs aiohttp: pip install 'telltale[http]'")
    forget_clients()
    server = HttpServer(bucket.parent)
    yield server
    server.shutdown()
    server.server_close()


URL = "s3://bucket/set"


def contents(shards):
    return [shards.read(i).tobytes() for i in range(len(shards))]


def opened(url, cache, split="train", patience=PATIENCE, **options):
    return ShardSet(url, split, cache=CacheOptions(cache, patience=patience, **options))


def test_from_s3_come_the_same_samples_and_nothing_but_copies_is_read(server, tiny_shards, tmp_path):
    plain = ShardSet(tiny_shards, "train")
    shards = opened(URL, tmp_path / "cache")
    ids = np.arange(len(plain))
    assert contents(shards) == contents(plain)
    assert np.array_equal(shards.identities(ids), plain.identities(ids))
    assert shards.about(3) == plain.about(3)
    assert data_fingerprint(shards) == data_fingerprint(plain)
    digests = {entry["sha256"] for entry in plain.shards}
    entry = plain.manifest["splits"]["train"]
    digests |= {entry["index"]["sha256"], entry["identities"]["sha256"]}
    assert {path.stem for path in (tmp_path / "cache").iterdir() if path.name != ".lock"} == digests
    server.kill()
    assert contents(shards) == contents(plain)


def test_the_default_cache_is_said_and_used(server, tmp_path, capfd):
    shards = ShardSet(URL, "test", verify=True)
    contents(shards)
    assert len(list((tmp_path / "default-cache").glob("*.tar"))) == len(shards.shards)
    told = capfd.readouterr().out
    assert f"copies of remote shards are kept in {tmp_path / 'default-cache'}, at most" in told


def test_a_server_killed_in_the_middle_and_started_again_is_waited_for(
    server, tiny_shards, tmp_path, monkeypatch
):
    proxy = Proxy(server.port)
    point_s3_at(monkeypatch, proxy.port)
    shards = opened(URL, tmp_path / "cache")
    proxy.rate, before = 100_000, proxy.passed

    def restart():
        while proxy.passed < before + 100_000:
            time.sleep(0.01)
        server.kill()
        time.sleep(3)
        proxy.rate = 0
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
    thread.join(PATIENCE)
    proxy.close()


def test_cut_and_slow_connections_give_the_same_bytes(server, tiny_shards, tmp_path, monkeypatch):
    proxy = Proxy(server.port)
    point_s3_at(monkeypatch, proxy.port)
    shards = opened(URL, tmp_path / "cache")
    proxy.cut_after, proxy.rate = 40_000, 400_000  # two parts pass, the third breaks
    assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
    assert proxy.cuts >= 5
    proxy.close()


def test_a_server_that_stays_away_ends_in_one_line_that_names_the_url(server, tmp_path):
    shards = opened(URL, tmp_path / "cache", patience=2.0)
    server.kill()
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{URL}/train/000000.tar: cannot be read \(no answer for 2 s"):
        shards.read(0)
    assert time.monotonic() - begin < 30
    server.start()
    assert len(shards.read(0)) > 0  # what was given up is tried again when it is asked for


def test_a_wrong_key_bucket_or_folder_ends_at_once(server, monkeypatch):
    for url in ("s3://bucket/none", "s3://none/set"):
        with pytest.raises(UserError, match=rf"{url}/manifest.json: not found; is it a shard folder\?"):
            read_manifest(url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    with pytest.raises(UserError, match=rf"{URL}/manifest.json: cannot be read \(access refused"):
        read_manifest(URL)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    forget_clients()
    with pytest.raises(UserError, match=r"access refused \(Unable to locate credentials\)"):
        read_manifest(URL)


def test_a_missing_or_short_tar_is_found_on_opening(server, bucket, tmp_path):
    tar = bucket / "train" / "000001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(
        UserError, match=rf"000001.tar: {len(data) - 512} bytes, the manifest says {len(data)}"
    ):
        opened(URL, tmp_path / "cache")
    tar.unlink()
    with pytest.raises(
        UserError, match=r"s3://bucket/set/train/000001.tar: missing, but the manifest lists it"
    ):
        opened(URL, tmp_path / "cache")


def test_a_changed_tar_is_named_and_its_good_samples_are_read_where_damage_is_skipped(
    server, bucket, tiny_shards, tmp_path
):
    plain = ShardSet(tiny_shards, "train")
    tar = bucket / "train" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(plain.rows["offset"][0]) - 512] ^= 1  # in the first member's header
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"000000.tar key .*: the tar's SHA-256 is not the manifest's"):
        opened(URL, tmp_path / "cache").read(1)
    with pytest.raises(UserError, match=r"000000.tar: its SHA-256 is not the manifest's"):
        ShardSet(URL, "train", verify=True)
    shards = opened(URL, tmp_path / "cache", strict=False)
    assert shards.read(1).tobytes() == plain.read(1).tobytes()
    with pytest.raises(UserError, match="the tar holds something else there"):
        shards.read(0)
    checked, faults = verify_shards(URL)
    assert checked == sum(entry["samples"] for entry in plain.manifest["splits"].values())
    assert any("train/000000.tar: its SHA-256 is not the manifest's" in fault for fault in faults)


def test_a_changed_index_is_not_kept(server, bucket, tmp_path):
    index = bucket / "train" / "index.npy"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    with pytest.raises(
        UserError, match=r"s3://bucket/set/train/index.npy: its SHA-256 is not the manifest's"
    ):
        opened(URL, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_verify_checks_every_image(server, bucket, tiny_shards):
    assert verify_shards(URL) == verify_shards(tiny_shards)
    shutil.copy(bucket / "train" / "000000.tar", bucket / "train" / "000099.tar")
    assert verify_shards(URL)[1] == ["train/000099.tar: not in the manifest"]


def test_the_audit_reads_single_samples(server, tiny_shards):
    splits = ("train", "val")
    theirs = [_read_sample(ref) for ref in refs_of_shards(open_splits(URL, splits))]
    assert theirs == [_read_sample(ref) for ref in refs_of_shards(open_splits(tiny_shards, splits))]


def test_a_table_of_shards_is_copied_like_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_table, "TABLE_FROM", 3)
    folder = tmp_path / "disk" / "bucket"
    folder.mkdir(parents=True)
    plain = ShardSet(write_tiny_shards(folder), "train")
    server = S3Server(folder.parent)
    try:
        point_s3_at(monkeypatch, server.port)
        shards = opened("s3://bucket/shards", tmp_path / "cache")
        assert isinstance(shards.shards, shard_table.ShardTable)
        assert contents(shards) == contents(plain)
        assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    finally:
        server.kill()


def test_a_cache_below_the_window_goes_on_and_says_so(server, tiny_shards, tmp_path, capfd):
    plain = ShardSet(tiny_shards, "train")
    sizes = [entry["bytes"] for entry in plain.shards]
    shards = opened(URL, tmp_path / "cache", cap_gib=2.5 * max(sizes) / 2**30)
    order = TrainingOrder(shards, DataConfig(size=32, window_shards=4), 3, 8)
    for step in range(3):
        for work in training_specs(
            order, micro_batch=8, rank=0, world=1, first_step=step, last_step=step + 1
        ):
            for number in work.ids.tolist():
                assert shards.read(number).tobytes() == plain.read(number).tobytes()
    assert "is full: shards are copied again and again" in capfd.readouterr().err
    none = opened(URL, tmp_path / "small", cap_gib=0.5 * min(sizes) / 2**30)
    with pytest.raises(UserError, match=r"cannot be read \(larger than data.cache_gib\)"):
        none.read(0)


WORKER = """
import sys
from dataio.shards.local_cache import CacheOptions
from dataio.shards.shard_set import ShardSet
plain = ShardSet(sys.argv[3], "train")
for _ in range(2):
    shards = ShardSet(sys.argv[1], "train", cache=CacheOptions(sys.argv[2], patience=60))
    shards.tars.cache.plan(range(len(shards.shards)))
    assert all(shards.read(i).tobytes() == plain.read(i).tobytes() for i in range(len(plain)))
"""


def test_processes_of_a_machine_fetch_each_file_once(web, tiny_shards, tmp_path):
    words = [sys.executable, "-c", WORKER, f"{web.url}/set", str(tmp_path / "cache"), str(tiny_shards)]
    workers = [
        subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.communicate(timeout=2 * PATIENCE)[1] == ""
        assert worker.returncode == 0
    fetched = {path: count for path, count in web.asked.items() if path.endswith((".tar", ".npy"))}
    assert set(fetched.values()) == {1}  # parts are larger there than these files
    assert len(fetched) == len(ShardSet(tiny_shards, "train").shards) + 1


@pytest.mark.parametrize("ranges", [True, False])
def test_from_a_web_server_with_and_without_ranges(ranges, web, tiny_shards, tmp_path):
    web.ranges, web.failing = ranges, 2
    shards = opened(f"{web.url}/set", tmp_path / "cache")
    assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
    with pytest.raises(UserError, match=r"/none/manifest.json: not found"):
        read_manifest(f"{web.url}/none")
    if not ranges:  # the whole file is not asked for again and again
        assert max(count for path, count in web.asked.items() if path.endswith(".tar")) == 1


def test_from_azure_come_the_same_samples(tiny_shards, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    if find_spec("adlfs") is None or shutil.which("azurite-blob") is None:
        pytest.skip(
            "needs Azure's emulator and a client: npm install -g azurite; pip install 'telltale[azure]'"
        )
    port = free_port()
    words = ["azurite-blob", "--blobPort", str(port), "--location", str(tmp_path), "--skipApiVersionCheck"]
    emulator = subprocess.Popen([*words, "--silent"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # The account and key are those that every Azurite has.
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    monkeypatch.setenv(
        "AZURE_STORAGE_CONNECTION_STRING",
        f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;",
    )
    forget_clients()
    try:
        wait_until(lambda: listens(port), PATIENCE, "azurite")
        fsspec.filesystem("az").mkdir("box")
        fsspec.filesystem("az").put(str(tiny_shards), "az://box/set", recursive=True)
        shards = opened("az://box/set", tmp_path / "cache")
        assert contents(shards) == contents(ShardSet(tiny_shards, "train"))
        with pytest.raises(UserError, match=r"az://box/none/manifest.json: not found"):
            read_manifest("az://box/none")
        tar = shards.shards[0]["file"]
        fsspec.filesystem("az").rm(f"az://box/set/{tar}")
        with pytest.raises(UserError, match=rf"az://box/set/{tar}: missing, but the manifest lists it"):
            opened("az://box/set", tmp_path / "cache")
    finally:
        emulator.kill()
        emulator.wait()
        forget_clients()


def test_a_short_tar_on_a_web_server_is_named_when_it_is_copied(web, bucket, tmp_path):
    tar = bucket / "train" / "000000.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    shards = opened(f"{web.url}/set", tmp_path / "cache")
    with pytest.raises(UserError, match=r"/set/train/000000.tar: cannot be read \(.*truncated or changed\)"):
        shards.read(0)


def test_what_is_not_installed_is_named():
    missing = [(url, extra) for url, (extra, module) in EXTRAS.items() if find_spec(module) is None]
    if not missing:
        pytest.skip("every extra is installed here; nothing to name")
    for protocol, extra in missing:
        with pytest.raises(UserError, match=rf"{protocol}://x/y: .* pip install 'telltale\[{extra}\]'"):
            ShardSet(f"{protocol}://x/y", "train")


def test_a_url_that_cannot_be_is_one_line():
    with pytest.raises(UserError, match="ftp://x: unknown kind of URL, expected s3://"):
        ShardSet("ftp://x", "train")


@pytest.mark.parametrize(
    ("url", "command"),
    [
        (
            "s3://b/x",
            "aws s3 sync DIR s3://b/x --exclude manifest.json && aws s3 cp DIR/manifest.json s3://b/x/",
        ),
        ("hf://datasets/me/set/x", "hf upload me/set DIR x --repo-type dataset"),
        (
            "gs://b/x",
            "rclone copy DIR REMOTE:b/x --exclude /manifest.json && rclone copy DIR/manifest.json REMOTE:b/x",
        ),
    ],
)
def test_the_command_that_uploads_is_told(url, command):
    assert upload_command(url) == command


def test_a_remote_path_is_joined_like_a_local_one(server):
    path = RemotePath("s3://bucket/set/") / "train/000001.tar"
    assert str(path) == "s3://bucket/set/train/000001.tar" and path.suffix == ".tar"
    assert path.is_file() and not path.with_suffix(".none").is_file()
    assert Path(str(path.with_suffix(".idx"))).name == "000001.idx"
