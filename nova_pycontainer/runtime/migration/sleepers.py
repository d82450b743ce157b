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

"""Threads that sleep for some time: how much of it is over.

A thread that waits in nanosleep(2), poll(2), epoll_wait(2) or futex(2) and
is stopped by CRIU leaves the call. The kernel would continue it with what is
left of its time; what that is the kernel tells nobody, and CRIU does not dump
it. So the source looks at the guest's threads just before the freeze, while
they sleep: in which call, and since when. What is done with it on the
destination stands in :mod:`.patches`.

Since when: the scheduler notes when a thread last ran (``se.exec_start`` in
/proc/PID/sched, in the time of the CPU that it ran on). A thread of ours that
runs on the same CPU tells what time that is now.
"""

import dataclasses
import os
import re
import struct
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

#: The scheduler's clock does not follow NTP, which may make CLOCK_MONOTONIC
#: slower by this at most. A sleep must not end early.
_SLEW = 500e-6

_EXEC_START = re.compile(r'^se\.exec_start\s*:\s*(\d+\.\d+)$', re.M)
_SWITCHES = re.compile(r'^voluntary_ctxt_switches:\s*(\d+)$', re.M)
_NSPID = re.compile(r'^NSpid:.*?(\d+)$', re.M)

#: asm/unistd_64.h
NANOSLEEP, CLOCK_NANOSLEEP, POLL, FUTEX = 35, 230, 7, 202
EPOLL_WAIT, EPOLL_PWAIT, RESTART = 232, 281, 219
_CALLS = frozenset([
    NANOSLEEP, CLOCK_NANOSLEEP, POLL, FUTEX, EPOLL_WAIT, EPOLL_PWAIT, RESTART])
#: What a continued call (restart_syscall(2)) has on its stack.
_RESTARTS = (
    ('do_restart_poll', POLL), ('futex_wait_restart', FUTEX),
    ('posix_cpu_nsleep_restart', CLOCK_NANOSLEEP))


@dataclasses.dataclass(frozen=True)
class _Sleep:
    call: int
    #: CLOCK_MONOTONIC, in ns; never before it began.
    since: int | None
    switches: int


class Sleepers:
    """The sleeping threads of one container, for one migration.

    It remembers what it has seen: a dump that was tried and given up, or a
    round of memory that was sent ahead, has interrupted every sleep once.
    """

    def __init__(self, group: cgroup.Cgroup) -> None:
        self._group = group
        self._seen: dict[tuple[str, str], _Sleep] = {}
        #: Those that :meth:`frozen` has found: thread's directory, where it
        #: sleeps, its call, what was said of it.
        self.stopped: list[tuple[str, str, int, dict[str, ty.Any]]] = []

    def look(self, paused: bool = False) -> None:
        """Look at every thread. Before the freeze: it takes its time."""
        # Has to move from CPU to CPU.
        thread = threading.Thread(
            target=self._look, args=(paused,), name='sleepers')
        thread.start()
        thread.join()

    def _look(self, paused: bool) -> None:
        seen: dict[tuple[str, str], _Sleep] = {}
        by_cpu: dict[int, list[tuple[str, str, int, bool, int, float]]] = {}
        for thread in self._group.threads():
            found = _read(thread)
            if found is not None:
                where, call, continued, switches, cpu, start = found
                by_cpu.setdefault(cpu, []).append(
                    (thread, where, call, continued, switches, start))
        for cpu, threads in by_cpu.items():
            now, at = _cpu_time(cpu)
            for thread, where, call, continued, switches, start in threads:
                since = None
                if now is not None and 0 < start <= now:
                    slept = (now - start) * (1 - _SLEW)
                    since = at - int(slept * 1e6)
                before = self._seen.get((thread, where))
                if not paused and not continued:
                    # Another sleep at the same place. One that was begun
                    # again has what was left then as the whole of its time.
                    before = None
                if before is not None and before.since is not None:
                    since = min(before.since, since or at)
                if call == RESTART and before is not None:
                    call = before.call
                seen[thread, where] = _Sleep(call, since, switches)
        self._seen = seen

    def frozen(
        self, ahead: int, latest: int | None = None
    ) -> list[dict[str, ty.Any]]:
        """Those that sleep still, now that all are stopped.

        :param ahead: what the guest's CLOCK_MONOTONIC is ahead of ours, in
            ns
        :param latest: CLOCK_MONOTONIC, in ns, of the stop. Then those count
            too that have begun since the look
        :returns: thread's id in the container, its call, since when at least
            it sleeps, and for how long it has asked to, in ns
        """
        self.stopped = []
        for (thread, where), sleep in self._seen.items():
            self._note(thread, where, sleep, ahead, latest)
        if latest is not None:
            known = {thread for thread, *_ in self.stopped}
            for thread in self._group.threads():
                found = None if thread in known else _read(thread)
                if found is not None:
                    self._note(thread, found[0], _Sleep(
                        found[1], latest, found[3]), ahead, latest)
        return [facts for *_, facts in self.stopped]

    def _note(self, thread: str, where: str, sleep: _Sleep, ahead: int,
              latest: int | None) -> None:
        """Note a thread if it is still where it was seen."""
        try:
            with open(f'{thread}/syscall') as f:
                here = f.read()
            status = procfs.text(f'{thread}/status')
        except OSError:
            return
        inner = _NSPID.search(status)
        switches = _SWITCHES.search(status)
        if not inner or not switches or here.split(None, 1)[1:] != [where]:
            return
        # The one switch is the stop. After more of them it may be another
        # sleep at the same place.
        same = int(switches[1]) - sleep.switches <= 1
        since = sleep.since if same else latest
        self.stopped.append((thread, where, sleep.call, {
            'tid': int(inner[1]), 'call': sleep.call,
            'since': None if since is None else since + ahead,
            'asked': _asked(thread, where, sleep.call)}))


def _read(thread: str) -> tuple[str, int, bool, int, int, float] | None:
    """Where it sleeps, in which call, whether that is continued by the kernel,
    context switches, CPU, last run (ms).
    """
    try:
        with open(f'{thread}/syscall') as f:
            where = f.read()
        call = where.split(None, 1)[0]
        # "running", or -1: in no system call.
        if not call.isdigit() or int(call) not in _CALLS:
            return None
        number = int(call)
        continued = number == RESTART
        if continued:
            with open(f'{thread}/stack') as f:
                number = _continued(f.read(), where.split()[1])
        switches = _SWITCHES.search(procfs.text(f'{thread}/status'))
        cpu = int(procfs.text(f'{thread}/stat').rpartition(')')[2].split()[36])
        try:
            start = _EXEC_START.search(procfs.text(f'{thread}/sched'))
        except OSError:
            # A kernel without CONFIG_SCHED_DEBUG.
            start = None
    except (OSError, IndexError):
        return None
    if switches is None:
        return None
    # The call's number changes when it is continued; the rest does not.
    return (where.split(None, 1)[1], number, continued, int(switches[1]),
            cpu, float(start[1]) if start else 0.0)


def _asked(thread: str, where: str, call: int) -> int | None:
    """What a thread without an address for the rest wants to sleep, in ns.
    """
    arguments = [int(a, 16) for a in where.split()[:4]]
    if call == NANOSLEEP:
        request, rest = arguments[:2]
    elif call == CLOCK_NANOSLEEP:
        request, rest = arguments[2:]
    else:
        return None
    if rest:
        return None
    try:
        with open(f'{thread}/mem', 'rb', buffering=0) as f:
            f.seek(request)
            seconds, nanoseconds = struct.unpack('=qq', f.read(16))
    except (OSError, OverflowError, ValueError, struct.error):
        return None
    return int(seconds) * 10 ** 9 + int(nanoseconds)


def _continued(stack: str, first: str) -> int:
    for name, call in _RESTARTS:
        if name in stack:
            return call
    if any('+' in line and 'do_syscall' not in line and
           'entry_' not in line for line in stack.splitlines()):
        return RESTART
    # The rest of a sleep leaves no frame: its function does nothing after.
    # The first argument is a clock's number, or an address.
    return CLOCK_NANOSLEEP if int(first, 16) < 4096 else NANOSLEEP


def _cpu_time(cpu: int) -> tuple[float | None, int]:
    """A CPU's time (ms), and a CLOCK_MONOTONIC (ns) that is not before it.
    """
    try:
        os.sched_setaffinity(0, [cpu])
        with open('/proc/thread-self/sched') as f:
            now = _EXEC_START.search(f.read())
    except OSError as e:
        LOG.debug('the time of CPU %d: %s', cpu, e)
        now = None
    return float(now[1]) if now else None, time.monotonic_ns()
