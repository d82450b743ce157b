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

"""After a dump that was given up: sleeps of the source go on.

CRIU lets the processes go on as it would have restored them: those that
slept have got EINTR, see :mod:`.registers`. The container is frozen before
CRIU lets go of it, so that nobody has seen that yet; then each such thread is
stopped once more, by us, and its registers are corrected.
"""

import collections.abc as cabc
import ctypes
import os
import platform
import re
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime.migration import registers
from nova_pycontainer.runtime import syscalls

LOG = logging.getLogger(__name__)

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_GETREGS, _SETREGS = 12, 13
_WALL = 0x40000000
_STOP_TIMEOUT = 2.0
#: Of a 32-bit program on x86_64.
_CS_COMPAT = 0x23

_STATUS = re.compile(
    r'^(SigPnd|ShdPnd|SigBlk|SigCgt|Seccomp_filters):\s*(\w+)$', re.M)

_libc = ctypes.CDLL(None, use_errno=True)


class _UserRegs(ctypes.Structure):
    """struct user_regs_struct of x86_64, sys/user.h"""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        'r15', 'r14', 'r13', 'r12', 'bp', 'bx', 'r11', 'r10', 'r9', 'r8',
        'ax', 'cx', 'dx', 'si', 'di', 'orig_ax', 'ip', 'cs', 'flags', 'sp',
        'ss', 'fs_base', 'gs_base', 'ds', 'es', 'fs', 'gs')]


class Sleep(ty.NamedTuple):
    """A thread that slept when it was frozen.

    :param thread: its directory in /proc
    :param where: arguments of its call, stack pointer and next instruction
    :param call: the number of its call
    :param facts: see :meth:`.sleepers.Sleepers.frozen`
    """

    thread: str
    where: str
    call: int
    facts: registers.Facts


def resume(
    sleeps: cabc.Iterable[Sleep], now: int, init: int
) -> None:
    """Let sleeps go on. The container is frozen, and no longer traced.

    :param now: the guest's CLOCK_MONOTONIC, in ns
    :param init: pid of the container's init
    """
    if platform.machine() != 'x86_64':
        # The kernel itself rewinds what it has interrupted.
        return
    usual = _status(f'/proc/{init}').get('Seccomp_filters')
    for sleep in sleeps:
        try:
            _resume(sleep, now, usual)
        except OSError as e:
            # It has ended, or never stops: killed, or in the kernel.
            LOG.info('%s does not sleep on: %s', sleep.thread, e)


def _status(thread: str) -> dict[str, str]:
    with open(f'{thread}/status') as f:
        return dict(_STATUS.findall(f.read()))


def _ptrace(request: int, tid: int, data: object = None) -> None:
    if _libc.ptrace(
            ctypes.c_long(request), ctypes.c_long(tid), None, data) < 0:
        raise syscalls.oserror('ptrace')


def _resume(sleep: Sleep, now: int, usual: str | None) -> None:
    tid = int(os.path.basename(sleep.thread))
    status = _status(sleep.thread)
    pending, private, blocked, caught = (
        int(status.get(n, '0'), 16)
        for n in ('ShdPnd', 'SigPnd', 'SigBlk', 'SigCgt'))
    # Only this thread of ours may speak to it.
    _ptrace(_SEIZE, tid)
    try:
        _ptrace(_INTERRUPT, tid)
        _wait(tid)
        regs = _UserRegs()
        _ptrace(_GETREGS, tid, ctypes.byref(regs))
        pointers = [int(n, 16) for n in sleep.where.split()[-2:]]
        if [regs.sp, regs.ip] != pointers:
            # It has gone on.
            return
        before = regs.orig_ax
        regs.orig_ax = sleep.call
        if registers.Registers(
                regs, sleep.facts, status.get('Seccomp_filters') == usual,
                now, bool((pending | private) & ~blocked & caught),
                regs.cs == _CS_COMPAT).patch():
            regs.orig_ax = before
            _ptrace(_SETREGS, tid, ctypes.byref(regs))
    finally:
        _ptrace(_DETACH, tid)


def _wait(tid: int) -> None:
    """:raises TimeoutError: it does not stop"""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while True:
        found, status = os.waitpid(tid, _WALL | os.WNOHANG)
        if found:
            if os.WIFSTOPPED(status):
                return
            raise ProcessLookupError(tid)
        if time.monotonic() > deadline:
            raise TimeoutError(f'thread {tid} does not stop')
        time.sleep(0.0005)
