#!/usr/bin/env python3
"""A real, throw-away SLURM cluster of several nodes on one machine, for testing batch scripts.

    tests/cluster/kit.py up DIR [--mode auto|net|plain] [--nodes 2] [--gpus 8] ...
    tests/cluster/kit.py run DIR -- sbatch job.sh     (any command, inside the cluster)
    tests/cluster/kit.py kill-node DIR n2             (power loss: slurmd, steps, tasks)
    tests/cluster/kit.py start-node DIR n2
    tests/cluster/kit.py down DIR
    tests/cluster/kit.py serve DIR ...                (in the foreground, until TERM)

Needs slurmctld, slurmd, slurm-client and munge (Debian's packages). Configuration, key, sockets,
state and logs are in DIR; no service, no /etc/slurm, no /etc/hosts and no system key is read or
changed. Partitions: main (default), preempt (requeued, with a grace time), urgent (preempts).

Two modes
  net    each node has network, host name, processes and mounts of its own, joined by a bridge,
         and names n1, n2, ... that exist inside the cluster only. Needs iproute2, util-linux and
         root or unprivileged user namespaces. A script that takes localhost for the rendezvous
         fails here, as it would on a real cluster.
  plain  no privileges at all. All nodes share this host and are named by loopback addresses
         (127.0.0.11, ...), so what `scontrol show hostnames` prints can be connected to.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.cluster.config import Options, write_config
from tests.cluster.namespaces import INSTALL, can_isolate, enter, first_inside, missing_programs, unshare
from tests.cluster.processes import children, die_with_parent, is_zombie
from tests.cluster.supervisor import KIT, Supervisor, run_node


def read_info(folder: Path) -> dict[str, object]:
    """What is known of the cluster that runs in a folder: its options and process ids."""
    try:
        info = json.loads((folder / "run/info.json").read_text())
        if b"cluster/kit.py" in Path(f"/proc/{info['pid']}/cmdline").read_bytes():
            return dict(info)
    except OSError:
        pass
    raise SystemExit(f"no cluster runs in {folder}")


def is_running(folder: Path) -> bool:
    try:
        return bool(read_info(folder))
    except SystemExit:
        return False


def inside(folder: Path) -> list[str]:
    """Command prefix that runs something inside the cluster."""
    info = read_info(folder)
    options = Options(**info["options"])  # type: ignore[arg-type]
    return enter(int(str(info["controller"])), options) if options.mode == "net" else []


def send(folder: Path, *words: str) -> None:
    """Give the supervisor a command and wait until it is done."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(folder / "run/kit.sock"))
    client.sendall(" ".join(words).encode())
    answer = json.loads(client.recv(4096) or b"{}")
    if "error" in answer:
        raise SystemExit(answer["error"])


def serve(folder: Path, options: Options) -> None:
    if missing := missing_programs():
        raise SystemExit(f"not installed: {', '.join(missing)}; {INSTALL}")
    if is_running(folder):
        raise SystemExit(f"{folder} has a running cluster")
    for name in ("run", "state", "spool"):  # nothing left from an earlier one
        shutil.rmtree(folder / name, ignore_errors=True)
    if options.mode == "auto":
        options.mode = "net" if can_isolate() else "plain"
    options.uid, options.gid = os.geteuid(), os.getegid()
    options.user_namespace = options.mode == "net" and options.uid != 0
    write_config(folder, options)
    info = {"options": asdict(options), "pid": os.getpid(), "controller": os.getpid()}
    record = folder / "run/info.json"
    try:
        if options.mode == "plain":
            record.write_text(json.dumps(info))
            Supervisor(folder, options).serve()
            return
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        within = subprocess.Popen(
            [*unshare(), *KIT, "_supervisor", str(folder), json.dumps(asdict(options))],
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: stop_within(within.pid))
        info["controller"] = first_inside(within.pid)
        record.write_text(json.dumps(info))
        raise SystemExit(within.wait())
    finally:
        record.unlink(missing_ok=True)


def stop_within(unshared: int) -> None:
    for pid in children(unshared)[:1]:
        os.kill(pid, signal.SIGTERM)


def up(folder: Path, words: Sequence[str]) -> None:
    parse_options(words)
    folder.mkdir(parents=True, exist_ok=True)
    if is_running(folder):
        raise SystemExit(f"{folder} has a running cluster")
    log = folder / "supervisor.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*KIT, "serve", str(folder), *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    while process.poll() is None:
        if b"READY" in log.read_bytes():
            print(f"export SLURM_CONF={folder}/slurm.conf")
            return
        time.sleep(0.1)
    sys.stderr.write(log.read_text())
    raise SystemExit(1)


def down(folder: Path) -> None:
    pid = int(str(read_info(folder)["pid"]))
    try:
        send(folder, "stop")
    except OSError:
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 60
    while not is_zombie(pid):
        if time.monotonic() > end:
            raise SystemExit(f"supervisor {pid} did not stop")
        time.sleep(0.1)


def run_inside(folder: Path, words: Sequence[str]) -> None:
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    command = [*inside(folder), *(words[1:] if words[:1] == ["--"] else words)]
    os.execvp(command[0], command)


def parse_options(words: Sequence[str]) -> Options:
    default = Options()
    parser = argparse.ArgumentParser(prog="kit.py serve|up DIR")
    add = parser.add_argument
    add("--mode", choices=("auto", "net", "plain"), default=default.mode)
    add("--nodes", type=int, default=default.nodes)
    add("--gpus", type=int, default=default.gpus, help="fake GPUs of a node")
    add("--cpus", type=int, default=default.cpus, help="CPUs that a node claims to have")
    add("--mem", type=int, default=default.mem, help="MB that a node claims to have")
    add("--kill-wait", type=int, default=default.kill_wait, help="seconds from TERM to KILL")
    add("--slurmd-timeout", type=int, default=default.slurmd_timeout, help="seconds until a node is down")
    add("--grace", type=int, default=default.grace, help="GraceTime of the partition preempt, seconds")
    add("--job-requeue", type=int, default=default.job_requeue, help="1: jobs are requeued unasked")
    add(
        "--proctrack",
        choices=("pgid", "cgroup", "linuxproc"),
        default=default.proctrack,
        help="who gets `scancel --signal`. cgroup, as on real clusters: the tasks that srun started and "
        "nothing below them (needs root and a writable cgroup v1 freezer; one cluster at a time); pgid: "
        "their process groups, so not torchrun's workers; linuxproc: all descendants, more than on a "
        "real cluster",
    )
    add("--preempt-term", action="store_true", help="preemption warns by TERM, not by the job's --signal")
    add("--partition", action="append", default=[], help="name of a further partition")
    add("--debug", default=default.debug, help="level of the daemons' logs")
    add("--until-stdin-eof", action="store_true", help="stop when standard input ends")
    return Options(**vars(parser.parse_args(words)))


def main(words: Sequence[str]) -> None:
    if len(words) < 2:
        raise SystemExit(__doc__)
    verb, folder, rest = words[0], Path(words[1]).resolve(), list(words[2:])
    verbs: dict[str, Callable[[], None]] = {
        "serve": lambda: serve(folder, parse_options(rest)),
        "up": lambda: up(folder, rest),
        "down": lambda: down(folder),
        "run": lambda: run_inside(folder, rest),
        "kill-node": lambda: send(folder, verb, *rest),
        "start-node": lambda: send(folder, verb, *rest),
        "_node": lambda: run_node(folder, Options(**json.loads(rest[0])), rest[1]),
        "_supervisor": lambda: Supervisor(folder, Options(**json.loads(rest[0]))).serve(),
    }
    if verb not in verbs:
        raise SystemExit(__doc__)
    verbs[verb]()


if __name__ == "__main__":
    main(sys.argv[1:])
