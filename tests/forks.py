"""Our scripts in processes of their own, forked from one that has imported what they import.

Of a run that takes a second, imports would take three more. Processes that begin with them, by
`python` and by `torchrun`, are in test_resume_is_bitwise.py, test_many_machines.py and
test_readme_changes_work.py.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.forks", "train", "finetune", "eval", "torch._dynamo"])


def script(name, *args, processes=0, **settings):
    """Runs a script of ours in a process of its own, or in several as torchrun starts them;
    returns a subprocess.CompletedProcess, with the output of all."""
    return Script(name, *args, processes=processes, **settings).ended()


class Script:
    """A script of ours that runs."""

    def __init__(self, name, *args, processes=0, **settings):
        options = [f"--{key}={value}" for key, value in settings.items()]
        self.command = [str(ROOT / name), *args, *options]
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / name for name in ("out", "err")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environments = [environment]
        if processes:
            port = free_port()
            ranks = range(processes)
            environments = [environment | as_of_torchrun(r, processes, port) for r in ranks]
        start_server()
        self.processes, self.told = [], False
        for environment in environments:
            where = self.command, environment, os.getcwd(), self.outputs
            self.processes.append(FORKS.Process(target=run_here, args=where))
            self.processes[-1].start()

    def send_signal(self, number, processes=None):
        self.told = True
        for process in processes or self.processes:
            os.kill(process.pid, number)

    def is_running(self):
        """Do all of its processes run?"""
        return all(process.is_alive() for process in self.processes)

    def ended(self, limit=300):
        """Waits for it. The status is that of the first process that fails, which ends the
        others unless a signal was sent to all; if none fails, 0."""
        end = time.monotonic() + limit
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes) and not self.told:
                break
            assert time.monotonic() < end
            time.sleep(0.01)
        status = next((p.exitcode for p in self.processes if p.exitcode), 0)
        for process in self.processes:
            process.terminate()
            process.join(20)
            process.kill()  # if it waits for one that is gone
            process.join()
        said = [path.read_text(encoding="utf-8") for path in self.outputs]
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.command, status, *said)


def as_of_torchrun(rank, processes, port):
    """The environment that torchrun gives to a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_RUN_ID": str(port),
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip


def start_server():
    """The process that the others are forked from."""
    # the number of threads is read when torch is loaded
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()


def run_here(command, environment, folder, outputs):
    """Be the process that `python *command` would be."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
