"""The options of a test cluster and the files that Slurm's daemons read."""

import os
import pwd
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.177.0"  # private to the cluster's namespaces
CONTROLLER_PORT, NODE_PORT = 6817, 6818

MAIN = "MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"


@dataclass
class Options:
    """What a cluster is like. `mode` is "net" or "plain" once it runs."""

    mode: str = "auto"
    nodes: int = 2
    gpus: int = 8
    cpus: int = 64
    mem: int = 512000
    kill_wait: int = 5
    slurmd_timeout: int = 15
    grace: int = 20
    job_requeue: int = 0
    proctrack: str = "pgid"
    preempt_term: bool = False
    partition: list[str] = field(default_factory=list)
    debug: str = "info"
    until_stdin_eof: bool = False
    uid: int = -1
    gid: int = -1
    user_namespace: bool = False

    @property
    def names(self) -> list[str]:
        """The nodes' names. In plain mode they are addresses, which need no look-up."""
        if self.mode == "net":
            return [f"n{i + 1}" for i in range(self.nodes)]
        return [f"127.0.0.{11 + i}" for i in range(self.nodes)]

    def address(self, name: str) -> str:
        """A node's address in net mode."""
        return f"{NETWORK}.{11 + self.names.index(name)}"


def write_config(folder: Path, options: Options) -> None:
    """Write slurm.conf, gres.conf, cgroup.conf, the key and the epilog into the cluster's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("run", "log", "state", "dev", "spool", "cgroup"):
        (folder / name).mkdir(exist_ok=True)
    if len(str(folder / "run/munge.sock")) > 100:
        raise SystemExit(f"{folder}: path too long for a Unix socket; use a short folder")
    key = folder / "munge.key"
    if not key.exists():
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
    # gres/gpu insists on character devices; links to /dev/null need no mknod.
    for i in range(options.gpus):
        link = folder / "dev" / f"gpu{i}"
        if not link.is_symlink():
            link.symlink_to("/dev/null")
    if options.mode == "net":
        _write_name_service(folder, options)
    (folder / "slurm.conf").write_text(_slurm_conf(folder, options))
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nName=gpu File={folder}/dev/gpu[0-{options.gpus - 1}]\n" if options.gpus else ""
    )
    # 22.05 always loads a cgroup plugin; v1 on an empty directory touches nothing.
    mount = "/sys/fs/cgroup" if options.proctrack == "cgroup" else f"{folder}/cgroup"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={mount}\n")
    epilog = folder / "epilog.sh"
    script = Path(__file__).with_name("epilog.py")
    epilog.write_text(f"#!/bin/sh\nexec {sys.executable} -S {script} {folder}\n")
    epilog.chmod(0o755)


def _write_name_service(folder: Path, options: Options) -> None:
    nodes = "".join(f"{options.address(name)} {name}\n" for name in options.names)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{NETWORK}.1 ctl\n{nodes}")
    # With DNS left on, each reverse look-up of gloo and of the rendezvous waits 5 to 10 s.
    (folder / "nsswitch.conf").write_text(
        "passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\nprotocols: files\n"
    )


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _slurm_conf(folder: Path, options: Options) -> str:
    user = pwd.getpwuid(options.uid).pw_name
    if options.mode == "net":
        controller, controller_port = f"ctl({NETWORK}.1)", CONTROLLER_PORT
        hosts = [f"NodeHostname={n} NodeAddr={options.address(n)} Port={NODE_PORT}" for n in options.names]
    else:
        controller_port, *ports = _free_ports(options.nodes + 1)
        controller = "localhost(127.0.0.1)"
        hosts = [f"NodeHostname=localhost Port={port}" for port in ports]
    size = f"CPUs={options.cpus} RealMemory={options.mem}"
    if options.gpus:
        size += f" Gres=gpu:{options.gpus}"
    nodes = [f"NodeName={n} {h} {size} State=UNKNOWN" for n, h in zip(options.names, hosts, strict=True)]
    partitions = [
        f"PartitionName=main Nodes=ALL Default=YES {MAIN}",
        "PartitionName=preempt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE "
        f"GraceTime={options.grace}",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF",
    ]
    partitions += [f"PartitionName={name} Nodes=ALL {MAIN}" for name in options.partition]
    warning = "" if options.preempt_term else "SlurmctldParameters=preempt_send_user_signal"
    return f"""\
ClusterName=telltale
SlurmctldHost={controller}
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits (BeginTime); 5 is the least.
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldDebug={options.debug}
SlurmdDebug={options.debug}
# no binding, no accounting database
ProctrackType=proctrack/{options.proctrack}
Epilog={folder}/epilog.sh
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
# more CPUs, memory and GPUs than this machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
EnforcePartLimits=ALL
DefMemPerCPU=100
GresTypes=gpu
ReturnToService=2
# Fast reactions. MinJobAge: scontrol still answers for a job that ended.
KillWait={options.kill_wait}
SlurmdTimeout={options.slurmd_timeout}
SlurmctldTimeout=30
MessageTimeout=10
MinJobAge=3600
CompleteWait=0
# 0 is strict: only jobs that say --requeue are requeued.
JobRequeue={options.job_requeue}
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
{warning}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
""" + "".join(f"{line}\n" for line in nodes + partitions)
