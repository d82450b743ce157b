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

"""Processes of which we are not the parent, by facts that cannot be reused.
"""

import dataclasses
import errno
import os
import pathlib
import re
import select
import signal
import typing as ty

from nova_pycontainer.runtime import procfs


def boot_id() -> str:
    return pathlib.Path(
        '/proc/sys/kernel/random/boot_id').read_text().strip()


@dataclasses.dataclass(frozen=True)
class ProcessId:
    """A process for ever: a pid alone is reused.

    :param start_time: clock ticks since boot, field 22 of proc_pid_stat(5)
    """

    pid: int
    start_time: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> 'ProcessId':
        """:raises ProcessLookupError: there is no such process"""
        return cls(pid, _start_time(pid), boot_id())

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'ProcessId':
        return cls(int(data['pid']), int(data['start_time']),
                   str(data['boot_id']))

    def open(self) -> int | None:
        """Return a pidfd, or None when the process is gone.

        The descriptor comes first: a check of the start time before it could
        be of another process.
        """
        if self.boot_id != boot_id():
            return None
        try:
            fd = pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        try:
            if _start_time(self.pid) == self.start_time:
                return fd
        except ProcessLookupError:
            pass
        os.close(fd)
        return None


def pidfd_open(pid: int) -> int:
    """As os.pidfd_open.

    :raises ProcessLookupError: there is no such process, for all kernels:
        those before 6.16 call it EINVAL as long as the number is still that of
        a session or of a process group
    """
    try:
        return os.pidfd_open(pid)
    except OSError as e:
        if e.errno == errno.EINVAL:
            raise ProcessLookupError(
                errno.ESRCH, f'no process {pid}') from None
        raise


def _start_time(pid: int) -> int:
    try:
        text = procfs.text(f'/proc/{pid}/stat')
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, f'no process {pid}') from None
    # The command's name, in parentheses, may hold anything.
    return int(text.rpartition(')')[2].split()[19])


def numbers(pid: int) -> list[int]:
    """The numbers of a process or a thread in its PID namespaces.

    :returns: the outermost first (NSpid of proc_pid_status(5))
    :raises OSError: there is none
    """
    for line in procfs.lines(f'/proc/{pid}/status'):
        if line.startswith('NSpid:'):
            return [int(number) for number in line.split()[1:]]
    raise ProcessLookupError(pid)


def uninterruptible(thread: str) -> bool:
    """Whether a thread is in such a sleep, TASK_UNINTERRUPTIBLE of the kernel.

    :param thread: its directory, of proc_pid_task(5)
    """
    try:
        stat = procfs.text(f'{thread}/stat')
    except OSError:
        return False
    return stat.rpartition(') ')[2][:1] == 'D'


def traced(thread: str) -> bool:
    """Whether somebody traces a thread; see ptrace(2).

    :param thread: its directory, of proc_pid_task(5)
    """
    try:
        status = procfs.text(f'{thread}/status')
    except OSError:
        return False
    found = re.search(r'^TracerPid:\s*(\d+)$', status, re.M)
    return found is not None and int(found[1]) > 0


def exited(pidfd: int, timeout: float = 0.0) -> bool:
    """Whether the process has ended, waiting at most ``timeout`` seconds."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def heeds(pid: int, number: int) -> bool:
    """Whether a process has blocked or ignored a signal, or has a handler.

    What has nothing of it yet is dropped for the init of a PID namespace, see
    pid_namespaces(7). One that waits in sigtimedwait(2), as busybox's does,
    has its signals blocked, but the kernel does not show that meanwhile.
    """
    try:
        status = procfs.lines(f'/proc/{pid}/status')
        if 'sigtimedwait' in procfs.text(f'/proc/{pid}/wchan'):
            return True
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in status
             if line.startswith(('SigBlk:', 'SigIgn:', 'SigCgt:'))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def kill_session(session: int, program: str) -> None:
    """Kill those of a session that execute a program, whose leader has
    ended.

    CRIU that was killed leaves what it was about to restore, which waits for
    it for ever, in no cgroup of the container's yet. While there is one of
    them, no new session gets that number (setsid(2)).

    :param program: name of the file
    """
    for name in os.listdir('/proc'):
        if not name.isdigit():
            continue
        try:
            pidfd = pidfd_open(int(name))
        except (OSError, ProcessLookupError):
            continue
        try:
            # What is read now is of the process that is held.
            fields = procfs.text(
                f'/proc/{name}/stat').rpartition(')')[2].split()
            if int(fields[3]) == session and os.path.basename(
                    os.readlink(f'/proc/{name}/exe')) == program:
                send_signal(pidfd, signal.SIGKILL)
        except OSError:
            continue
        finally:
            os.close(pidfd)


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal; a process that is gone is no error."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        pass
