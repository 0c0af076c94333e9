"""The processes of a running cluster: munged, slurmctld, and one helper per node with its slurmd.

One supervisor owns them all. Each node's helper adopts what detaches from slurmd, so that
slurmstepd and the jobs' processes stay its descendants; stopping walks that tree.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.cluster.config import NETWORK, Options
from tests.cluster.namespaces import as_user, first_inside, has_link, ip, unshare, which
from tests.cluster.processes import adopt_orphans, descendants, die_with_parent, is_zombie, kill_tree, reap

KIT = [sys.executable, "-S", str(Path(__file__).with_name("kit.py"))]


def run_node(folder: Path, options: Options, name: str) -> None:
    """Be process 1 of a node (net), or the parent of its processes (plain), until TERM."""
    adopt_orphans()
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(1))
    if options.mode == "net":
        socket.sethostname(name)
        while not has_link("eth0"):
            if stop:
                return
            time.sleep(0.02)
        # No default route: an attempt to leave the cluster fails at once, not by a time-out.
        for command in (
            f"addr add {options.address(name)}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
        ):
            ip(command)
    (folder / "spool" / name).mkdir(exist_ok=True)
    slurmd = [*as_user(options), which("slurmd"), "-D", "-N", name, "-f", str(folder / "slurm.conf")]
    with open(folder / "log" / f"slurmd.{name}.out", "ab") as log:
        subprocess.Popen(slurmd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    while not stop:
        reap()
        time.sleep(0.1)
    kill_tree(os.getpid(), signal.SIGTERM, 1.0)
    kill_tree(os.getpid())
    reap()


class Supervisor:
    """Starts a cluster, answers commands on a socket, and takes everything down with itself."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        self.daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        # What we started, and what to signal in its place: the child of `unshare`.
        self.inner: dict[int, int] = {}
        self.stopping = False

    def serve(self) -> None:
        """Run until told to stop; "READY" on standard output when all nodes are idle."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        path = self.folder / "run/kit.sock"
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        try:
            self.start()
            server.bind(str(path))
            server.listen()
            server.settimeout(0.2)
            print("READY", flush=True)
            while not self.stopping and not self._owner_gone():
                try:
                    client, _ = server.accept()
                except TimeoutError:
                    self._reap_orphans()
                    continue
                with client:
                    words = client.recv(4096).decode().split()
                    client.sendall(json.dumps(self._answer(*words)).encode())
        finally:
            self.shut_down()
            server.close()
            path.unlink(missing_ok=True)

    def start(self) -> None:
        folder, options = self.folder, self.options
        adopt_orphans()
        if options.mode == "net":
            socket.sethostname("ctl")
            for name in ("hosts", "nsswitch.conf"):
                subprocess.run(["mount", "--bind", folder / name, f"/etc/{name}"], check=True)
            for command in (
                "link set lo up",
                "link add kit0 type bridge",
                f"addr add {NETWORK}.1/24 dev kit0",
                "link set kit0 up",
            ):
                ip(command)
        user = as_user(options)
        munged = [
            which("munged"),
            "--foreground",
            "--force",
            f"--socket={folder}/run/munge.sock",
            f"--key-file={folder}/munge.key",
            f"--log-file={folder}/log/munged.log",
            f"--pid-file={folder}/run/munged.pid",
            f"--seed-file={folder}/run/munge.seed",
        ]
        self._spawn("munged", [*user, *munged])
        self._wait((folder / "run/munge.sock").exists, 30, "munged")
        self._spawn("slurmctld", [*user, which("slurmctld"), "-D", "-f", str(folder / "slurm.conf")])
        for name in options.names:
            self.start_node(name)
        self._wait(self._all_idle, 120, "all nodes to be idle")

    def start_node(self, name: str) -> None:
        """Start a node's helper; nothing where it runs."""
        if name in self.nodes and self.nodes[name].poll() is None:
            return
        command = [*KIT, "_node", str(self.folder), json.dumps(asdict(self.options)), name]
        if self.options.mode == "plain":
            self.nodes[name] = self._spawn(f"node.{name}", command)
            return
        # `unshare` ignores TERM.
        node = self._spawn(f"node.{name}", [*unshare(outermost=False), *command], signal.SIGKILL)
        self.nodes[name] = node
        inner = self.inner[node.pid] = first_inside(node.pid)
        link = f"veth{self.options.names.index(name)}"
        ip(f"link add {link} type veth peer name eth0 netns {inner}")
        ip(f"link set {link} master kit0 up")

    def kill_node(self, name: str) -> None:
        """Cut a node's power: everything on it is killed at once."""
        node = self.nodes[name]
        if node.poll() is not None:
            return
        if self.options.mode == "plain":
            kill_tree(node.pid)
        # In net mode this is process 1 of the node, so the kernel kills all others with it.
        os.kill(self.inner.get(node.pid, node.pid), signal.SIGKILL)
        node.wait(30)

    def shut_down(self) -> None:
        """Stop nodes, slurmctld and munged; then whatever is left."""
        for _, process in reversed(self.daemons):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.kill(self.inner.get(process.pid, process.pid), signal.SIGTERM)
                    process.wait(8)
        if not kill_tree(os.getpid()):
            print("some processes survived", file=sys.stderr)
        if self.options.proctrack == "cgroup":
            for name in self.options.names:
                for top, _, _ in os.walk(f"/sys/fs/cgroup/freezer/slurm_{name}", topdown=False):
                    try:
                        os.rmdir(top)
                    except OSError as error:
                        print(error, file=sys.stderr)

    def _spawn(
        self, name: str, command: list[str], death: signal.Signals = signal.SIGTERM
    ) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent(death),
            )
        self.daemons.append((name, process))
        return process

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if self.stopping:
                raise SystemExit("stopped while starting")
            for name, process in self.daemons:
                if process.poll() is not None:
                    raise SystemExit(f"{name} exited with {process.returncode}; see {self.folder}/log")
            if time.monotonic() > end:
                raise SystemExit(f"waited {seconds} s for {what}; see {self.folder}/log")
            time.sleep(0.1)

    def _all_idle(self) -> bool:
        command = [*as_user(self.options), which("sinfo"), "-h", "-N", "-p", "main", "-o", "%t"]
        variables = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        try:
            shown = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=15)
        except subprocess.TimeoutExpired:
            return False
        return shown.returncode == 0 and shown.stdout.split() == ["idle"] * self.options.nodes

    def _answer(self, verb: str = "", *words: str) -> dict[str, str]:
        try:
            if verb == "stop":
                self.stopping = True
            elif verb == "kill-node":
                self.kill_node(words[0])
            elif verb == "start-node":
                self.start_node(words[0])
            else:
                return {"error": f"unknown command {verb}"}
        except Exception as error:  # whatever it was, the cluster keeps running
            return {"error": repr(error)}
        return {}

    def _on_signal(self, *_: object) -> None:
        self.stopping = True

    def _owner_gone(self) -> bool:
        """Whether standard input has ended: the pipe closes when its writer dies, however it dies."""
        if not self.options.until_stdin_eof:
            return False
        return bool(select.select([0], [], [], 0)[0]) and not os.read(0, 4096)

    def _reap_orphans(self) -> None:
        known = {process.pid for _, process in self.daemons}  # subprocess waits for these
        for pid in descendants(os.getpid()):
            if pid not in known and is_zombie(pid):
                with contextlib.suppress(OSError):
                    os.waitpid(pid, os.WNOHANG)
