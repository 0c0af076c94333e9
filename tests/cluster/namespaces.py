"""The machine's programs and its namespaces: a node in "net" mode has a network and processes of its own."""

import os
import shutil
import subprocess
import time

from tests.cluster.config import Options
from tests.cluster.processes import children

SYSTEM = ":/usr/sbin:/sbin:/usr/bin"  # where the daemons are; not on every user's PATH

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "scontrol", "srun")
INSTALL = "apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge"


def missing_programs() -> list[str]:
    """Which of Slurm's programs this machine lacks."""
    return [name for name in PROGRAMS if not find(name)]


def which(name: str) -> str:
    """The full path of a program; its name, which will not be found either, where there is none."""
    return find(name) or name


def find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + SYSTEM)


def unshare(*, outermost: bool = True) -> list[str]:
    """Command prefix for new namespaces; an ordinary user needs a user namespace around them."""
    user = ["--user", "--map-root-user"] if outermost and os.geteuid() != 0 else []
    own = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [which("unshare"), *user, *own]


def can_isolate() -> bool:
    """Whether this machine allows "net" mode."""
    if not all(find(tool) for tool in ("unshare", "nsenter", "ip", "mount")):
        return False
    probe = (
        "ip link set lo up && ip link add br0 type bridge && ip link add v0 type veth peer name v1 && "
        "mount --bind /etc/hosts /etc/hosts"
    )
    return subprocess.run([*unshare(), "sh", "-c", probe], capture_output=True).returncode == 0


def as_user(options: Options) -> list[str]:
    """Command prefix that gives Slurm's programs the user's own id.

    In a user namespace we are its root, which Slurm takes for the real one; slurmctld then dies
    of setgroups. A second user namespace gives our own id back.
    """
    if not options.user_namespace:
        return []
    return [which("unshare"), "--user", f"--map-user={options.uid}", f"--map-group={options.gid}", "--"]


def enter(pid: int, options: Options) -> list[str]:
    """Command prefix that runs something in the namespaces of a process, in the same folder."""
    words = [which("nsenter"), "-t", str(pid), "-n", "-m", "-u", "-p", f"--wd={os.getcwd()}"]
    if options.user_namespace:
        words += ["-U", "--preserve-credentials"]
    return [*words, "--", *as_user(options)]


def first_inside(unshared: int) -> int:
    """The process that `unshare --fork` started, once it is in a network namespace of its own."""
    mine = os.readlink("/proc/self/ns/net")
    for _ in range(500):
        for child in children(unshared):
            try:
                if os.readlink(f"/proc/{child}/ns/net") != mine:
                    return child
            except OSError:
                continue
        time.sleep(0.02)
    raise RuntimeError("no process appeared in the new namespaces")


def has_link(device: str) -> bool:
    # Not /sys: that shows the network in which it was mounted.
    return subprocess.run(["ip", "link", "show", device], capture_output=True).returncode == 0


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)
