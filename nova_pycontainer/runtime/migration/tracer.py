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

"""Another process's threads, stopped by ptrace(2), on x86_64.

All calls for one thread have to come from one thread of ours.
"""

import collections.abc as cabc
import contextlib
import ctypes
import os
import platform
import re
import signal
import time

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import syscalls

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_GETREGS, _SETREGS, _SINGLESTEP, _CONT = 12, 13, 9, 7
_WALL = 0x40000000
_STOP_TIMEOUT = 2.0
_SYSCALL = b'\x0f\x05'
_CS_COMPAT = 0x23
_U64 = (1 << 64) - 1
#: Bytes; those of today's kernels have two pages.
_VDSO_SIZE = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    return platform.machine() == 'x86_64'


class UserRegs(ctypes.Structure):
    """struct user_regs_struct of x86_64, sys/user.h"""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        'r15', 'r14', 'r13', 'r12', 'bp', 'bx', 'r11', 'r10', 'r9', 'r8',
        'ax', 'cx', 'dx', 'si', 'di', 'orig_ax', 'ip', 'cs', 'flags', 'sp',
        'ss', 'fs_base', 'gs_base', 'ds', 'es', 'fs', 'gs')]

    @property
    def compat(self) -> bool:
        """Whether they are of a thread that runs 32-bit code."""
        return bool(self.cs == _CS_COMPAT)


class Interrupted(OSError):
    """A signal has come in the place of what was waited for."""


class Thread:
    """A thread that stands still until it is detached."""

    def __init__(self, tid: int) -> None:
        self._tid = tid
        #: It is the thread's, and is given to it at the end.
        self._signal = 0

    def _ptrace(self, request: int, data: object = None) -> None:
        if _libc.ptrace(ctypes.c_long(request), ctypes.c_long(self._tid),
                        None, data) < 0:
            raise syscalls.oserror('ptrace')

    def seize(self) -> None:
        """:raises OSError: it has ended, or is traced by somebody else"""
        self._ptrace(_SEIZE)

    def interrupt(self) -> None:
        """:raises OSError: it has ended, or does not stop"""
        self._ptrace(_INTERRUPT)
        self._wait()

    def _wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or _STOP_TIMEOUT)
        while True:
            found, status = os.waitpid(self._tid, _WALL | os.WNOHANG)
            if found:
                if os.WIFSTOPPED(status):
                    return status
                raise ProcessLookupError(self._tid)
            if time.monotonic() > deadline:
                raise TimeoutError(f'thread {self._tid} does not stop')
            time.sleep(0.0005)

    def detach(self) -> None:
        self._ptrace(_DETACH, ctypes.c_long(self._signal))

    def registers(self) -> UserRegs:
        regs = UserRegs()
        self._ptrace(_GETREGS, ctypes.byref(regs))
        return regs

    def set_registers(self, regs: UserRegs) -> None:
        self._ptrace(_SETREGS, ctypes.byref(regs))

    def call(
        self, number: int, *arguments: int, timeout: float | None = None
    ) -> int:
        """Let it make a system call, as if it had wanted to.

        What it does itself goes on afterwards, a system call that waits
        included: its registers say so to the kernel.

        :param timeout: seconds that the call may wait, 2 by default. For a
            page it waits on if need be: the kernel breaks that off for a
            signal that kills only
        :returns: what the call returns, or -errno
        :raises Interrupted: it has been called, or not
        :raises TimeoutError: it was broken off
        :raises OSError: it cannot be done with this thread
        """
        before = self.registers()
        if before.compat:
            raise OSError('a 32-bit process')
        regs = UserRegs.from_buffer_copy(before)
        regs.ip = self._instruction(before.ip)
        regs.ax = number
        # Else the kernel would take it for a call that was interrupted.
        regs.orig_ax = _U64
        for name, value in zip(
                ('di', 'si', 'dx', 'r10', 'r8', 'r9'), arguments,
                strict=False):
            setattr(regs, name, value)
        self.set_registers(regs)
        late: TimeoutError | None = None
        try:
            self._ptrace(_SINGLESTEP)
            try:
                status = self._wait(timeout)
            except TimeoutError as e:
                late = e
                self._ptrace(_INTERRUPT)
                status = self._wait()
            if status >> 16 and self._has_trap():
                # The end of the step is still to come, and would be a signal
                # to the thread.
                self._ptrace(_CONT)
                status = self._wait()
            result = int(self.registers().ax)
        finally:
            self.set_registers(before)
        if os.WSTOPSIG(status) != signal.SIGTRAP or status >> 16:
            if not status >> 16:
                self._signal = os.WSTOPSIG(status)
            raise Interrupted(f'thread {self._tid}: stopped by {status:#x}')
        if late:
            raise late
        return result - (1 << 64) if result >> 63 else result

    def _has_trap(self) -> bool:
        with open(f'/proc/{self._tid}/status',
                  errors='surrogateescape') as status:
            pending, = re.findall(r'^SigPnd:\s+(\w+)$', status.read(), re.M)
        return bool(int(pending, 16) >> (signal.SIGTRAP - 1) & 1)

    def _instruction(self, ip: int) -> int:
        """Address of a ``syscall`` instruction in its memory."""
        with open(f'/proc/{self._tid}/mem', 'rb', buffering=0) as f:
            with contextlib.suppress(OSError, OverflowError, ValueError):
                f.seek(ip - len(_SYSCALL))
                if f.read(len(_SYSCALL)) == _SYSCALL:
                    return ip - len(_SYSCALL)
            start, size = self._vdso()
            f.seek(start)
            at = f.read(size).find(_SYSCALL)
            if at < 0:
                raise OSError('no system call instruction in the vDSO')
            return start + at

    def _vdso(self) -> tuple[int, int]:
        # Paths are the guest's, in any bytes, and may end like that too. Those
        # of files begin with "/", and have an inode.
        with open(f'/proc/{self._tid}/maps', 'rb') as maps:
            for line in maps:
                fields = line.rstrip(b'\n').split(None, 5)
                if fields[3:] == [b'00:00', b'0', b'[vdso]']:
                    start, end = (int(n, 16) for n in fields[0].split(b'-'))
                    return start, min(end - start, _VDSO_SIZE)
        raise OSError('no vDSO')


@contextlib.contextmanager
def stopped(tid: int) -> cabc.Iterator[Thread]:
    """:raises OSError: it has ended, or does not stop"""
    thread = Thread(tid)
    thread.seize()
    try:
        thread.interrupt()
        yield thread
    finally:
        # It may be gone: killed.
        with contextlib.suppress(ProcessLookupError):
            thread.detach()


def held_still(
    group: cgroup.Cgroup, stack: contextlib.ExitStack
) -> dict[int, Thread]:
    """Hold every thread of a frozen container, and thaw it.

    No system call can be made in a frozen process. At the end of the stack
    it is frozen first, so that nothing of it runs.
    """
    threads: dict[int, Thread] = {}
    for pid in group.processes():
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(f'/proc/{pid}/task'):
                threads[int(name)] = stack.enter_context(
                    stopped(int(name)))
    freeze = group.v2 / 'cgroup.freeze'
    stack.callback(freeze.write_text, '1')
    freeze.write_text('0')
    return threads
