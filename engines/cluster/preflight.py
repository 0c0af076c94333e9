"""Check the nodes of a job before training: that they are alike and fit.

A node without the data, with other versions or with a lost GPU is found before the first step.
Each node inspects itself and reports to the first one through a key-value store; the first one
decides. Then a small all-reduce is timed, which also shows that the nodes can communicate.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from dataio.core.errors import UserError, one_line, reason_of
from dataio.shards.manifest import sha256_of
from dataio.sources.remote_path import AnyPath, RemotePath, place_of
from engines.runtime.command import EXIT_USER_ERROR
from engines.runtime.versions import version_of

_PACKAGES = ("torch", "nvidia-dali-cuda130", "numpy", "deepspeed", "transformers")
SOURCES = ("dataio", "models", "engines", "launch")
CLOCK_SECONDS = 5.0  # a larger difference makes the times of files and logs misleading
LEAST_FREE_GIB = 1.0
REDUCED_BYTES, REDUCED_TIMES = 16 << 20, 3
SHARED_SECONDS = 15.0  # delay until a network file system shows a new file
_MARK = ".preflight"
MISSING = "missing"


@dataclass(frozen=True)
class Place:
    """Position of this node among the job's nodes, and the address of the first one; timeout in seconds."""

    number: int
    names: Sequence[str]
    head: str
    port: int
    timeout: int

    @property
    def is_head(self) -> bool:
        return self.number == 0

    @property
    def name(self) -> str:
        return self.names[self.number]


@dataclass(frozen=True)
class Chosen:
    """The run that is about to start.

    Attributes:
        run: its folder. files: files that every node must see, by their configuration key.
        drawn: whether missing data will be generated. default_config: used because none was
            given, "" if one was. why: the reason for that choice.
    """

    run: Path
    files: dict[str, AnyPath]
    drawn: bool
    default_config: str
    why: str


@dataclass
class Node:
    """The state of a node: digests of files, versions; free GiB, seconds of clock offset, GB/s."""

    name: str
    gpus: int = 0
    gpu: str = ""
    promised: str = ""
    alike: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)
    problem: str = ""
    apart: float = 0.0
    bandwidth: float | None = None


def choose_run(script: str, flags: Sequence[str], *, gpu_config: str, cpu_config: str, root: Path) -> Chosen:
    """Parse the command that is about to run, with the default configuration for this node.

    Raises:
        UserError: what the command itself would raise.
    """
    from engines.config.detector import Config
    from engines.config.mlm import FinetuneConfig
    from engines.config.parser import parse_as
    from engines.train.initial_weights import weights_files

    given = any(word.partition("=")[0] == "--config" for word in flags)
    on_gpu = torch.cuda.is_available()
    default = gpu_config if on_gpu else cpu_config
    if script == "launch/train.py":
        config = parse_as(Config, flags, root / default)
        files = {"data.shards": place_of(config.data.shards) / "manifest.json", **weights_files(config)}
        drawn, run = config.data.synthetic.images > 0, config.run.dir
    else:
        tuned = parse_as(FinetuneConfig, flags, root / default)
        data = {"data.conversations": tuned.data.conversations, "data.val": tuned.data.val}
        files = {key: Path(value) for key, value in data.items() if value}
        files |= {f"evaluate.benchmarks {name}": Path(name) for name in tuned.evaluate.benchmarks}
        if ":" not in tuned.model.weights:
            files["model.weights"] = Path(tuned.model.weights) / "config.json"
        drawn = tuned.data.generate.images > 0
        run = tuned.run.dir
    why = "" if given else f"no --config, and {'GPUs' if on_gpu else 'no GPU'} here: {default}"
    return Chosen(Path(run), files, drawn, "" if given else default, why)


# ---- one node ---------------------------------------------------------------------------


def look(name: str, chosen: Chosen, root: Path) -> Node:
    """Inspect this node."""
    node = Node(name, promised=os.environ.get("SLURM_GPUS_ON_NODE", ""))
    node.gpus = torch.cuda.device_count()
    node.gpu = torch.cuda.get_device_name(0) if node.gpus else ""
    node.problem = _gpu_problem(node.gpus)
    versions = {name: version_of(name) or MISSING for name in _PACKAGES}
    node.alike = {"Python": platform.python_version(), **versions, "telltale's source": _source_digest(root)}
    node.files = {key: _digest(path) for key, path in chosen.files.items()}
    node.free = {"run.dir": _free_gib(chosen.run)}
    if scratch := os.environ.get("TELLTALE_SCRATCH"):
        node.free["TELLTALE_SCRATCH"] = _free_gib(Path(scratch))
    return node


def _gpu_problem(count: int) -> str:
    for number in range(count):
        try:
            product = torch.ones(512, 512, device=f"cuda:{number}").mm(
                torch.ones(512, 512, device=f"cuda:{number}")
            )
            if float(product.sum()) != 512.0**3:
                return f"GPU {number} gives a wrong matrix product"
        except RuntimeError as error:
            return f"GPU {number}: {one_line(error)[:160]}"
    return ""


def _source_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _digest(path: AnyPath) -> str:
    """A digest of a file's size and first MiB, enough to identify its version; "folder" for a folder."""
    try:
        if isinstance(path, RemotePath):
            return sha256_of(path)[:12]
        if path.is_dir():
            return "folder"
        with open(path, "rb") as file:
            return hashlib.sha256(str(path.stat().st_size).encode() + file.read(1 << 20)).hexdigest()[:12]
    except OSError:
        return MISSING


def _free_gib(folder: Path) -> float:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


# ---- all nodes --------------------------------------------------------------------------


def check_nodes(place: Place, look_here: Callable[[], tuple[Chosen, Node]]) -> tuple[Chosen, list[Node]]:
    """Inspect and compare all nodes; each node calls this.

    Args:
        look_here: inspects this node.

    Returns:
        what will run, and the nodes in their order (on the first node; on others only this one).

    Raises:
        UserError: on the first node, for a node that is unfit or did not answer.
        SystemExit: on the other nodes; the first one reports the reason.
    """
    try:
        store = dist.TCPStore(
            place.head,
            place.port,
            is_master=place.is_head,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=place.timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{place.name}: cannot reach {place.head}:{place.port} ({one_line(error)[:160]}); check "
            "TELLTALE_INTERFACE and the network between the nodes"
        ) from None
    store.add("connected", 1)
    try:
        chosen, node = look_here()
    except UserError as error:
        if place.is_head:
            store.set("decision", "bad")
            _wait_for_connections(store, place)
            raise
        with contextlib.suppress(dist.DistError, RuntimeError):  # the first node has ended
            store.set(f"node{place.number}", json.dumps(asdict(Node(place.name, problem=str(error)))))
        raise SystemExit(EXIT_USER_ERROR) from None
    if not place.is_head:
        return chosen, [_answer(store, place, chosen, node)]
    nodes = _gather(store, place, chosen, node)
    problem = find_problem(nodes, chosen)
    store.set("decision", "bad" if problem else "good")
    if problem:
        raise UserError(problem)
    nodes[0].bandwidth = _bandwidth(store, place, nodes[0])
    return chosen, nodes


def _wait_for_connections(store: dist.TCPStore, place: Place) -> None:
    """Keep the store until the other nodes have found it, or they would retry for minutes."""
    end = time.monotonic() + min(place.timeout, 30.0)
    while store.add("connected", 0) < len(place.names) and time.monotonic() < end:
        time.sleep(0.1)


def _answer(store: dist.TCPStore, place: Place, chosen: Chosen, node: Node) -> Node:
    """The exchange of a node that is not the first."""
    mark = chosen.run / _MARK
    try:
        token = store.get("token").decode()
        if not _appears(mark, token):
            node.problem = node.problem or (
                f"run.dir {chosen.run} is not the first node's: it must be on storage that all nodes share"
            )
        store.set(f"node{place.number}", json.dumps(asdict(node)))
        store.get(f"ask{place.number}")
        store.set(f"clock{place.number}", str(time.time()))
        if store.get("decision") == b"bad":
            raise SystemExit(EXIT_USER_ERROR)
    except (dist.DistError, RuntimeError):  # the first node has ended
        raise SystemExit(EXIT_USER_ERROR) from None
    _bandwidth(store, place, node)
    return node


def _appears(mark: Path, token: str) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            os.listdir(mark.parent)  # refreshes the cache of network file systems
            if mark.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _gather(store: dist.TCPStore, place: Place, chosen: Chosen, head: Node) -> list[Node]:
    token = f"{time.time_ns()} {os.getpid()}"
    try:
        chosen.run.mkdir(parents=True, exist_ok=True)
        (chosen.run / _MARK).write_text(token)
    except OSError as error:
        store.set("decision", "bad")
        raise UserError(
            f"run.dir {chosen.run}: cannot be written from {place.name} ({reason_of(error)}); choose another"
        ) from None
    store.set("token", token)
    nodes, silent = [head], []
    deadline = time.monotonic() + place.timeout
    for number in range(1, len(place.names)):
        key = f"node{number}"
        left = max(0.1, deadline - time.monotonic())
        try:
            store.wait([key], datetime.timedelta(seconds=left))
        except (dist.DistError, RuntimeError):
            silent.append(place.names[number])
            continue
        node = Node(**json.loads(store.get(key)))
        if not node.problem:
            store.set(f"ask{number}", "")
            node.apart = float(store.get(f"clock{number}")) - time.time()
        nodes.append(node)
    (chosen.run / _MARK).unlink(missing_ok=True)
    if silent:
        store.set("decision", "bad")
        raise UserError(
            f"{', '.join(silent)}: no answer within {place.timeout} s; check the node, or leave it out with "
            f"--exclude={','.join(silent)}"
        )
    return nodes


def find_problem(nodes: Sequence[Node], chosen: Chosen) -> str:
    """The first problem of a node, as one line that names it; "" if all nodes are fit."""
    for node in nodes:
        if node.problem:
            return f"{node.name}: {node.problem}; fix that, or leave it out with --exclude={node.name}"
    if not chosen.drawn:
        for key, path in chosen.files.items():
            without = [node.name for node in nodes if node.files[key] == MISSING]
            if without:
                return f"{key}: {path} does not exist on {', '.join(without)}; make it, or correct --{key.split()[0]}"
    facts: dict[str, Callable[[Node], str]] = {"GPUs": lambda node: f"{node.gpus} {node.gpu}".strip()}
    facts |= {name: lambda node, name=name: node.alike[name] for name in nodes[0].alike}  # type: ignore[misc]
    facts |= {key: lambda node, key=key: node.files[key] for key in chosen.files}  # type: ignore[misc]
    for name, fact in facts.items():
        usual = Counter(map(fact, nodes)).most_common(1)[0][0]
        for node in nodes:
            if fact(node) != usual:
                others = next(other.name for other in nodes if fact(other) == usual)
                return (
                    f"{node.name}: {name} is {fact(node)}, but {usual} on {others}; all nodes must be alike: "
                    f"fix it, or leave it out with --exclude={node.name}"
                )
    for node in nodes:
        for key, free in node.free.items():
            if free < LEAST_FREE_GIB:
                return f"{node.name}: {free:.2f} GiB free for {key}, expected at least {LEAST_FREE_GIB:g}; make room"
        if abs(node.apart) > CLOCK_SECONDS:
            return (
                f"{node.name}: its clock is {node.apart:+.1f} s off {nodes[0].name}'s, expected within "
                f"{CLOCK_SECONDS:g} s; set it, or leave it out with --exclude={node.name}"
            )
    return ""


def _bandwidth(store: dist.TCPStore, place: Place, node: Node) -> float | None:
    """GB/s of a small all-reduce between the nodes (bytes of the tensor over the time); None for one."""
    if len(place.names) == 1:
        return None
    on_gpu = node.gpus > 0
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("bandwidth", store),
            rank=place.number,
            world_size=len(place.names),
            timeout=datetime.timedelta(seconds=place.timeout),
        )
        tensor = torch.ones(REDUCED_BYTES // 4, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(tensor)
        begin = time.perf_counter()
        for _ in range(REDUCED_TIMES):
            dist.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / REDUCED_TIMES
        dist.barrier()  # no node may leave before all are done: the first one holds the store
        dist.destroy_process_group()
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"{place.name}: the nodes cannot communicate ({one_line(error)[:200]}); set TELLTALE_INTERFACE to "
            "the network that connects them (`ip -brief address` lists them)"
        ) from None
    return REDUCED_BYTES / seconds / 1e9


def processes_per_node(node: Node) -> int:
    """TELLTALE_PROCESSES_PER_NODE, or else one for each GPU of a node, and one where there is none.

    Raises:
        UserError: the variable is not a number of at least 1.
    """
    given = os.environ.get("TELLTALE_PROCESSES_PER_NODE")
    if given is None:
        return max(1, node.gpus)
    if not given.isdigit() or int(given) < 1:
        raise UserError(f"TELLTALE_PROCESSES_PER_NODE is {given!r}, expected a number of at least 1")
    return int(given)


def format_nodes(nodes: Sequence[Node], chosen: Chosen) -> str:
    """The nodes as a table, for the job's log."""
    lines = [chosen.why] if chosen.why else []
    for node in nodes:
        gpus = f"{node.gpus} x {node.gpu}" if node.gpus else "no GPU"
        if node.promised and node.promised != str(node.gpus):
            gpus += f" (Slurm gave {node.promised}, PyTorch sees {node.gpus})"
        free = ", ".join(f"{value:.0f} GiB free for {key}" for key, value in node.free.items())
        lines.append(f"{node.name}: {gpus}; {free}; clock {node.apart:+.2f} s")
    lines.append(", ".join(f"{name} {value}" for name, value in nodes[0].alike.items()))
    if nodes[0].bandwidth is not None:
        size = REDUCED_BYTES >> 20
        lines.append(f"all-reduce of {size} MiB between the nodes: {nodes[0].bandwidth:.2f} GB/s")
    return "\n".join(f"preflight: {line}" for line in lines)
