"""The keeper of a limited process: runs apart from the trainer, with the standard library alone.

    python -I -S sandbox_child.py SOCKET FOLDER LIMITS COMMAND…

Starts COMMAND in a session of its own in FOLDER under the kernel's limits (LIMITS is JSON:
{"cpu": seconds, "memory": bytes, "file": bytes}, null for none), waits for its end or for the
trainer to close SOCKET, kills whatever is left of it (children that moved to another session
included, where the kernel hands orphans to their keeper), removes FOLDER and writes one line to
SOCKET: `exit N` or `signal N`. It lives on when the trainer is killed, long enough to clean up.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress

PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>
PATIENCE = 2.0  # seconds spent on killing what is left


def main(words: list[str]) -> None:
    handle, folder, limits, command = int(words[0]), words[1], json.loads(words[2]), words[3:]
    os.set_inheritable(handle, False)
    _adopt_orphans()
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    pid = os.fork()
    if pid == 0:
        _become(command, folder, limits)
    os.close(0)  # the pipes belong to the command: their other ends see its end, not ours
    os.close(1)
    status = None
    while status is None:
        ready, _, _ = select.select([handle, wake], [], [])
        if wake in ready:
            os.read(wake, 512)
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            status = found
        elif handle in ready:
            break
    _kill_all(pid, reaped=status is not None)
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    word = "signal 9"
    if status is not None:
        killed = os.WIFSIGNALED(status)
        word = f"signal {os.WTERMSIG(status)}" if killed else f"exit {os.WEXITSTATUS(status)}"
    with suppress(OSError):  # nobody may be listening any more
        os.write(handle, word.encode() + b"\n")
    os._exit(0)


def _become(command: list[str], folder: str, limits: dict) -> None:
    """The child's part: limits, then the command. Never returns."""
    try:
        import resource

        os.setsid()
        os.chdir(folder)
        signal.set_wakeup_fd(-1)
        for name, key in (("RLIMIT_AS", "memory"), ("RLIMIT_FSIZE", "file"), ("RLIMIT_CPU", "cpu")):
            if limits.get(key) is not None and hasattr(resource, name):
                kind = getattr(resource, name)
                _, hard = resource.getrlimit(kind)
                value = int(limits[key])
                if hard != resource.RLIM_INFINITY:
                    value = min(value, hard)
                # A second of grace between SIGXCPU and SIGKILL; the other two have one meaning.
                over = value + 1 if key == "cpu" and hard == resource.RLIM_INFINITY else value
                with suppress(ValueError, OSError):  # a limit this system does not have
                    resource.setrlimit(kind, (value, over))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a shell must not
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.execvp(command[0], command)
    except BaseException as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    os._exit(127)


def _adopt_orphans() -> None:
    """Orphaned grandchildren become our children (Linux), so that they can be found and killed."""
    if sys.platform != "linux":
        return
    try:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        pass


def _kill_all(pid: int, reaped: bool) -> None:
    """Kill the command, its group and every descendant, until none is left."""
    deadline = time.monotonic() + PATIENCE
    _kill(os.killpg, pid)
    if not reaped:  # it may not have its own group yet
        _kill(os.kill, pid)
    while True:
        for other in _descendants(os.getpid()):
            _kill(os.kill, other)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def _kill(how, number: int) -> None:
    with suppress(OSError):  # gone already
        how(number, signal.SIGKILL)


def _descendants(root: int) -> list[int]:
    """Processes below `root`, by the parent ids in /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(name))
    found, open_ones = [], [root]
    while open_ones:
        below = children.get(open_ones.pop(), [])
        found += below
        open_ones += below
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
