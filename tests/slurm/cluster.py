"""A real SLURM on this machine: munged, slurmctld and one slurmd per node on loopback, up in about a second.

Nodes are named by addresses of the loopback network (127.0.0.2, 127.0.0.3, ...), so that what a job
derives from its node list resolves. Each offers eight GPUs that are null devices: real sbatch files
run up to the device itself. Needs root and Debian's slurm-wlm; `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
GPUS = 8
SECONDS = 300
"""The longest that anything here is waited for; each wait ends as soon as its condition holds."""

CONF = """\
ClusterName=longclip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
JobRequeue=1
KillWait=10
MessageTimeout=60
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 State=UP
"""
NODE = "NodeName={name} NodeAddr={name} NodeHostname={host} Port={port} CPUs=16 Gres=gpu:{gpus}\n"


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)" if absent else None


class Cluster:
    """Started by `with Cluster(folder) as cluster`; every daemon is stopped by its recorded pid."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.port = folder, free_port()
        self.nodes = [f"127.0.0.{2 + node}" for node in range(nodes)]
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._configure()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        conf = CONF.format(folder=self.folder, host=host, port=self.port)
        for index, node in enumerate(self.nodes):
            conf += NODE.format(name=node, host=host, port=self.port + 1 + index, gpus=GPUS)
        (self.folder / "slurm.conf").write_text(conf)
        gres = f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        for gpu in range(GPUS):
            os.mknod(self.folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)

    def _start(self) -> None:
        own = {
            option: f"--{option}-file={self.folder}/munge.{option}"
            for option in ("key", "pid", "log", "seed")
        }
        self.call("munged", "--force", f"--socket={self.folder}/munge.sock", *own.values())
        self.call("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: set(self.call("sinfo", "-h", "-N", "-o", "%t").split()) == {"idle"}, "nodes")

    def start_node(self, node: str) -> None:
        """A node that was down is taken back as soon as it reports (ReturnToService)."""
        self.call("slurmd", "-N", node)

    def lose_node(self, node: str) -> None:
        """Everything on the node is gone at once; the controller hears of it."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        for pid in self._tasks(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def _tasks(self, node: str) -> Iterator[int]:
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.env['SLURM_CONF']}".encode()}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= set((folder / "environ").read_bytes().split(b"\0")):
                    yield int(folder.name)

    def state(self, job: str) -> str:
        """The job's state, as `scontrol show job` names it."""
        shown = self.call("scontrol", "show", "job", job)
        return re.findall(r"JobState=(\S+)", shown)[0]

    def restarts(self, job: str) -> int:
        return int(re.findall(r"Restarts=(\d+)", self.call("scontrol", "show", "job", job))[0])

    def stop(self) -> None:
        subprocess.run(["scancel", "--me"], env=self.env, check=False, capture_output=True)
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        self.wait(lambda: not self.call("squeue", "-h", "-t", "R,CG", check=False), "jobs to end")
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGTERM)
        self.wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "daemons to end")

    def call(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def wait(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"waited {seconds} s for {what}\n{self.call('squeue', check=False)}"
            )
            time.sleep(0.1)


def free_port() -> int:
    """A port that is free now, with room for the nodes' after it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return min(int(s.getsockname()[1]), 65000)
