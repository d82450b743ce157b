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

"""Timers behind descriptors: exact on the destination.

CRIU dumps what a timerfd has left, and restores one that was set to an
absolute time as "left + now" with the fraction of *now* dropped
(``timerfd_arm`` in criu/pie/restorer.c says so in a FIXME): it fires up to a
second early. A program that then looks at the clock finds that it is not
time yet; systemd-networkd never renews its DHCP lease after that.

No image can say it right, since what is added is only known in the restored
process. So the source reads every timerfd and the clock beside it while
nothing of the guest runs, and the destination sets each of them again, to
the nanosecond, in the restored and still frozen processes. All other timers
(setitimer, timer_create) are restored by CRIU with what they had left: never
early, and late by the time between dump and restore.
"""

import collections.abc as cabc
import ctypes
import fcntl
import os
import re
import struct
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import syscalls

LOG = logging.getLogger(__name__)

_NS = 10 ** 9
_ABSTIME = 1
_CANCEL_ON_SET = 2
_SET_TICKS = 0x40085400  # TFD_IOC_SET_TICKS
_LINK = 'anon_inode:[timerfd]'

#: Clock of the kernel that a timer's clock goes with, if set relatively.
#: The alarm clocks are those that also wake a sleeping machine.
_STEADY = {
    time.CLOCK_REALTIME: time.CLOCK_MONOTONIC,
    time.CLOCK_MONOTONIC: time.CLOCK_MONOTONIC,
    time.CLOCK_BOOTTIME: time.CLOCK_BOOTTIME,
    8: time.CLOCK_BOOTTIME,  # CLOCK_REALTIME_ALARM
    9: time.CLOCK_BOOTTIME,  # CLOCK_BOOTTIME_ALARM
}
_OFFSETS = {'monotonic': time.CLOCK_MONOTONIC,
            'boottime': time.CLOCK_BOOTTIME}

_libc = ctypes.CDLL(None, use_errno=True)


class _Spec(ctypes.Structure):
    """struct itimerspec"""

    _fields_ = [(name, ctypes.c_long) for name in (
        'isec', 'insec', 'vsec', 'vnsec')]


def offsets(pid: int) -> dict[int, int]:
    """What the clocks of a process are ahead of the host's, in ns.

    time_namespaces(7). The file is of the namespace of the process's
    children, which is its own in all that CRIU restores.
    """
    found = dict.fromkeys(_OFFSETS.values(), 0)
    try:
        lines = procfs.lines(f'/proc/{pid}/timens_offsets')
    except OSError:
        # A kernel without time namespaces.
        return found
    for line in lines:
        name, seconds, nanoseconds = line.split()
        if name in _OFFSETS:
            found[_OFFSETS[name]] = int(seconds) * _NS + int(nanoseconds)
    return found


def inner_pid(pid: int) -> int:
    """The pid of a process, or a thread's id, in its own PID namespace.

    :raises OSError: there is no such process
    """
    return process.numbers(pid)[-1]


def save(
    ahead: cabc.Mapping[int, int], group: cgroup.Cgroup,
) -> list[dict[str, ty.Any]]:
    """The armed timerfds of a container in which nothing runs.

    :param ahead: see :func:`offsets`
    :returns: ``at`` is when it fires next, in ns of the guest's own clock
        ``clock``; ``ticks`` are what it has fired and nobody has read
    """
    found: list[dict[str, ty.Any]] = []
    for pid in group.processes():
        directory = f'/proc/{pid}/fd'
        try:
            numbers = os.listdir(directory)
        except OSError:
            continue
        mine = []
        for number in numbers:
            try:
                if os.readlink(f'{directory}/{number}') == _LINK:
                    mine.append(int(number))
            except OSError:
                continue
        if mine:
            inner = inner_pid(pid)
            for fd in mine:
                timer = _read(pid, fd, ahead)
                if timer:
                    found.append({'pid': inner, 'fd': fd, **timer})
    return found


_FDINFO = re.compile(
    r'clockid: (\d+)\nticks: (\d+)\nsettime flags: 0?([0-7]+)\n'
    r'it_value: \((\d+), (\d+)\)\nit_interval: \((\d+), (\d+)\)')


def _read(
    pid: int, fd: int, ahead: cabc.Mapping[int, int]
) -> dict[str, ty.Any] | None:
    """proc_pid_fdinfo(5): what it has left, so the clock is read right after.
    """
    text = procfs.text(f'/proc/{pid}/fdinfo/{fd}')
    clocks = {c: time.clock_gettime_ns(c) for c in (
        time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)}
    match = _FDINFO.search(text)
    if not match:
        return None
    clock, ticks, vsec, vnsec, isec, insec = (
        int(match[n]) for n in (1, 2, 4, 5, 6, 7))
    flags = int(match[3], 8)
    left = vsec * _NS + vnsec
    if not left or clock not in _STEADY:
        return None
    counts = _counts_in(clock, flags)
    return {
        'clock': clock, 'flags': flags, 'ticks': ticks,
        'at': clocks[counts] + ahead.get(counts, 0) + left,
        'interval': isec * _NS + insec}


def _counts_in(clock: int, flags: int) -> int:
    """The clock that a timer's end is fixed in."""
    if flags & _ABSTIME and clock in (time.CLOCK_REALTIME, 8):
        return time.CLOCK_REALTIME
    return _STEADY[clock]


def restore(
    init: int, group: cgroup.Cgroup,
    saved: cabc.Iterable[cabc.Mapping[str, ty.Any]],
) -> None:
    """Set the timerfds again. Nothing of the guest may run meanwhile.

    One that cannot be set stays as CRIU has set it.
    """
    wanted: dict[int, list[cabc.Mapping[str, ty.Any]]] = {}
    for timer in saved:
        wanted.setdefault(int(timer['pid']), []).append(timer)
    if not wanted:
        return
    ahead = offsets(init)
    for pid in group.processes():
        try:
            timers = wanted.pop(inner_pid(pid), None)
        except OSError:
            continue
        if timers:
            _restore_process(pid, timers, ahead)
        if not wanted:
            return
    LOG.warning('the processes %s of the guest with timers are not there',
                sorted(wanted))


def _restore_process(
    pid: int, timers: cabc.Iterable[cabc.Mapping[str, ty.Any]],
    ahead: cabc.Mapping[int, int],
) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        for timer in timers:
            try:
                fd = syscalls.pidfd_getfd(pidfd, int(timer['fd']))
            except OSError as e:
                LOG.warning('timer %s of process %d: %s', timer, pid, e)
                continue
            try:
                # A number of the guest's, of whatever is open by it now.
                if os.readlink(f'/proc/self/fd/{fd}') == _LINK:
                    _set(fd, timer, ahead)
            except OSError as e:
                LOG.warning('timer %s of process %d: %s', timer, pid, e)
            finally:
                os.close(fd)
    finally:
        os.close(pidfd)


def _set(
    fd: int, timer: cabc.Mapping[str, ty.Any], ahead: cabc.Mapping[int, int],
) -> None:
    clock, flags = int(timer['clock']), int(timer['flags'])
    counts = _counts_in(clock, flags)
    # We are in the host's time namespace: what we set is on its clocks.
    at = int(timer['at']) - ahead.get(counts, 0)
    if not flags & _ABSTIME:
        at -= time.clock_gettime_ns(counts)
    # 0 would disarm it; what has passed fires at once.
    vsec, vnsec = divmod(max(at, 1), _NS)
    isec, insec = divmod(int(timer['interval']), _NS)
    spec = _Spec(isec, insec, vsec, vnsec)
    if _libc.timerfd_settime(
            fd, flags & (_ABSTIME | _CANCEL_ON_SET), ctypes.byref(spec),
            None) < 0:
        raise syscalls.oserror('timerfd_settime')
    ticks = int(timer['ticks'])
    if ticks:
        # It may have fired just now.
        match = _FDINFO.search(procfs.text(f'/proc/self/fdinfo/{fd}'))
        if match:
            ticks += int(match[2])
        fcntl.ioctl(fd, _SET_TICKS, struct.pack('=Q', ticks))
