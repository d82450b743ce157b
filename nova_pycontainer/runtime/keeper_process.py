# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Children of the keeper: how one is started, and how one ends.

Only the standard library, and little of it: this runs in the keeper, whose
memory every host pays for.
"""

import collections.abc as cabc
import errno
import fcntl
import json
import os
import signal
import struct
import time
import typing as ty

#: Bytes of a command's output that are kept, counted from its end.
TAIL_BYTES: ty.Final = 8192

#: Format number of the file that :func:`write_exit` makes.
EXIT_FORMAT: ty.Final = 1

# linux/pidfd.h: _IOWR(0xFF, 11, struct pidfd_info) with the first published
# size of the structure, whose last field is exit_code (since Linux 6.15).
_PIDFD_GET_INFO: ty.Final = 0xC040FF0B
_PIDFD_INFO: ty.Final = struct.Struct('=QQ11Ii')
_PIDFD_INFO_EXIT: ty.Final = 1 << 3


class Exit(ty.NamedTuple):
    """How a process ended; both None where the kernel could not say."""

    pid: int
    code: int | None
    signal: int | None
    at: float
    start_time: int | None

    @classmethod
    def from_status(
        cls, pid: int, status: int, start_time: int | None = None
    ) -> 'Exit':
        """From a status word as wait(2) gives it."""
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        sig = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        return cls(pid, code, sig, time.time(), start_time)

    def as_dict(self) -> dict[str, ty.Any]:
        return {
            'pid': self.pid,
            'code': self.code,
            'signal': self.signal,
            'at': self.at,
        }


class Started(ty.NamedTuple):
    """A child between fork and exec.

    ``failure`` is a pipe: it closes at a successful exec and otherwise says
    which step failed. ``stdout`` and ``stderr`` are pipes, or None where the
    caller gave descriptors of its own.
    """

    pid: int
    failure: int
    stdout: int | None
    stderr: int | None


def start(
    argv: cabc.Sequence[str],
    env: cabc.Mapping[str, str],
    cwd: str,
    fds: cabc.Mapping[int, int],
    cgroup_procs: cabc.Sequence[str],
    capture: bool,
    nofile: tuple[int, int],
) -> Started:
    """Fork a child that joins the cgroups and executes ``argv``.

    Does not wait for anything: a cgroup that is frozen, or an executable on
    a dead network file system, must not stop the keeper.

    :param fds: number in the child → number here
    :param capture: make pipes for those of stdout and stderr that ``fds``
        does not have, else they are /dev/null
    :param nofile: RLIMIT_NOFILE of the child; the keeper raises its own
    :raises OSError: no process or descriptor to be had
    """
    pipes: list[int] = []
    targets = dict(fds)
    ends: dict[int, int] = {}
    try:
        failure_r, failure_w = os.pipe2(os.O_CLOEXEC)
        pipes += [failure_r, failure_w]
        for number in (1, 2):
            if capture and number not in targets:
                ends[number], targets[number] = os.pipe2(os.O_CLOEXEC)
                pipes += [ends[number], targets[number]]
                os.set_blocking(ends[number], False)
        os.set_blocking(failure_r, False)
        pid = os.fork()
    except OSError:
        for fd in pipes:
            os.close(fd)
        raise
    if pid == 0:
        _child(argv, env, cwd, targets, cgroup_procs, failure_w, nofile)
    os.close(failure_w)
    for number in ends:
        os.close(targets[number])
    return Started(pid, failure_r, ends.get(1), ends.get(2))


def _child(
    argv: cabc.Sequence[str],
    env: cabc.Mapping[str, str],
    cwd: str,
    targets: dict[int, int],
    cgroup_procs: cabc.Sequence[str],
    failure: int,
    nofile: tuple[int, int],
) -> ty.NoReturn:
    """Become ``argv``. Single threaded, so Python is safe after the fork."""
    step = 'signals'
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM,
                       signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        step = 'setsid'
        # A session of its own: a time-out kills the whole group, and a
        # signal to the keeper's group does not reach the child.
        os.setsid()
        for path in cgroup_procs:
            step = f'join {path}'
            # "0" is the writer itself, whatever its pid is called in the
            # reader's pid namespace (cgroups(7)).
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, b'0')
            os.close(fd)
        step = 'limits'
        _reset_limits(nofile)
        step = f'chdir {cwd}'
        os.chdir(cwd)
        os.umask(0o022)
        step = 'descriptors'
        failure = _place(targets, failure)
        step = f'exec {argv[0]}'
        os.execvpe(argv[0], [*argv], env)
    except BaseException as e:
        error = getattr(e, 'errno', None) or 0
        text = os.strerror(error) if error else repr(e)
        os.write(failure, json.dumps([step, error, text]).encode()[:4096])
    os._exit(127)


def _reset_limits(nofile: tuple[int, int]) -> None:
    # Not at the head: only children need it.
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, nofile)
    # The service manager protects the keeper from the OOM killer; a container
    # must not inherit that.
    with open('/proc/self/oom_score_adj', 'r+b', buffering=0) as f:
        if int(f.read()) < 0:
            f.write(b'0')


def _place(targets: dict[int, int], failure: int) -> int:
    """Put descriptors on their numbers; nothing else stays open.

    :returns: where the failure pipe, which closes at exec, now is
    """
    for number in (0, 1, 2):
        if number not in targets:
            targets[number] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    above = max(targets) + 1
    # First all of them out of the way of each other's numbers.
    high = {
        number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above)
        for number, fd in targets.items()
    }
    failure = fcntl.fcntl(failure, fcntl.F_DUPFD_CLOEXEC, above)
    for number, fd in high.items():
        os.dup2(fd, number, inheritable=True)
    # Everything is close-on-exec already; this is the second lock on the
    # door that CVE-2024-21626 went through.
    keep = sorted([*targets, failure])
    for low, top in zip(keep, keep[1:]):
        os.closerange(low + 1, top)
    os.closerange(failure + 1, 1 << 30)
    return failure


def failure_text(raw: bytes) -> tuple[str, int, str] | None:
    """What the failure pipe said; None for a successful exec."""
    if not raw:
        return None
    try:
        step, number, text = json.loads(raw)
        return str(step), int(number), str(text)
    except ValueError:
        return 'exec', 0, raw.decode(errors='replace')


def code_of(number: int) -> str:
    """The error code (:mod:`.errors`) for an errno."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return 'no_space' if number in full else 'internal'


class Tail:
    """The last :data:`TAIL_BYTES` of a pipe."""

    def __init__(self, fd: int | None) -> None:
        self.fd = fd
        self._data = b''

    def read(self, rounds: int = 1) -> bool:
        """Take what is there; False at the end of the file."""
        for _ in range(rounds):
            if self.fd is None:
                return False
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._data = (self._data + data)[-TAIL_BYTES:]
        return True

    def text(self) -> str:
        return self._data.decode(errors='replace')


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)), in clock ticks since boot.

    Together with the pid it names a process for ever. None if there is no
    such process.
    """
    try:
        with open(f'/proc/{pid}/stat', 'rb') as f:
            # The command's name may contain anything but its last ")".
            return int(f.read().rpartition(b')')[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def reap() -> cabc.Iterator[Exit]:
    """The children that have ended since the last call."""
    while True:
        try:
            # Look first, collect afterwards: a zombie still has its stat.
            info = os.waitid(
                os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if info is None:
                return
            born = start_time(info.si_pid)
            pid, status = os.waitpid(info.si_pid, 0)
        except ChildProcessError:
            return
        yield Exit.from_status(pid, status, born)


def is_child(pid: int) -> bool:
    """Whether ``pid`` is this process's own child, dead or alive."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def pidfd_status(pidfd: int) -> int | None:
    """The wait status of somebody else's child after it was collected.

    None before that, and on kernels older than 6.15.
    """
    buffer = bytearray(_PIDFD_INFO.size)
    _PIDFD_INFO.pack_into(buffer, 0, _PIDFD_INFO_EXIT, *[0] * 13)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError as e:
        if e.errno in (errno.ENOTTY, errno.EINVAL, errno.ESRCH):
            return None
        raise
    fields = _PIDFD_INFO.unpack(buffer)
    return int(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def write_exit(path: str, how: Exit) -> None:
    """Write an exit file so that a reader finds all of it or nothing.

    Without fsync: a power cut ends the container as well.

    :raises OSError: the directory is gone, or full
    """
    temporary = f'{path}.{os.getpid()}.tmp'
    fd = os.open(
        temporary,
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC,
        0o600)
    try:
        data = json.dumps({'format': EXIT_FORMAT, **how.as_dict()}) + '\n'
        os.write(fd, data.encode())
    finally:
        os.close(fd)
    os.replace(temporary, path)
