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

"""A thread of another process that is traced, ptrace(2), on x86_64.

For :mod:`.tracer`, which has the thread that may do so.
"""

import contextlib
import ctypes
import os
import signal
import time

from nova_pycontainer.runtime import syscalls

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_GETREGS, _SETREGS, _SYSCALL, _CONT = 12, 13, 24, 7
_GETEVENTMSG, _GETSIGINFO = 0x4201, 0x4202
_GETSIGMASK, _SETSIGMASK = 0x420a, 0x420b
#: PTRACE_O_TRACESYSGOOD, and what it adds to the number of the signal
_O_SYSGOOD, _SYSGOOD = 1, 0x80
_EVENT_STOP = 128
#: PTRACE_EVENTMSG_SYSCALL_ENTRY
_ENTRY = 1
_WALL = 0x40000000
#: Bytes: sigset_t of the kernel, siginfo_t
_MASK_SIZE, _INFO_SIZE = 8, 128
#: What the kernel sends to a thread for what it does itself. If it is blocked
#: the kernel takes away the thread's handler and ends the process.
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGSYS)
_FAULTS_MASK = sum(1 << (fault - 1) for fault in _FAULTS)
#: linux/errno.h, ERESTARTSYS to ERESTART_RESTARTBLOCK: not done
_RESTARTS = range(-516, -511)
#: ERESTARTNOHAND: interrupted, and begun again if no handler is to run
_NO_HANDLER = 514
#: seconds
STOP_TIMEOUT = 2.0
_INSTRUCTION = b'\x0f\x05'
_CS_COMPAT = 0x23
_U64 = (1 << 64) - 1
#: Bytes; those of today's kernels have two pages.
_VDSO_SIZE = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


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


class Tracee:
    """Only the thread that traces it may call this."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        #: Its registers, while it has others.
        self.own: UserRegs | None = None
        #: What it has blocked, while all is; and whether the call that it
        #: waits in, like sigsuspend(2) or ppoll(2), has changed that meanwhile
        self._mask: tuple[int, bool] | None = None

    def _ptrace(self, request: int, address: int | None = None,
                data: object = None) -> None:
        if _libc.ptrace(ctypes.c_long(request), ctypes.c_long(self.tid),
                        ctypes.c_void_p(address), data) < 0:
            raise syscalls.oserror('ptrace')

    def _go_on(self, request: int, number: int = 0) -> None:
        self._ptrace(request, data=ctypes.c_long(number))

    def hold(self) -> None:
        """:raises OSError: it has ended, does not stop, or is traced by
            somebody else
        """
        self._ptrace(_SEIZE, data=ctypes.c_long(_O_SYSGOOD))
        self._stop()

    def _wait(self, deadline: float | None) -> int:
        """:param deadline: None: without end"""
        while True:
            found, status = os.waitpid(
                self.tid, _WALL if deadline is None else _WALL | os.WNOHANG)
            if found:
                if os.WIFSTOPPED(status):
                    return status
                self.own = None
                raise ProcessLookupError(self.tid)
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f'thread {self.tid} does not stop')
            time.sleep(0.0005)

    def _stop(self, number: int | None = None) -> None:
        """Let it come to the stop that PTRACE_INTERRUPT is for.

        A signal that it got before is given to it, which makes the frame of
        its handler: the kernel looks for that stop before it looks for another
        signal, and before any code of the process runs.

        :param number: of the signal that it goes on with; None: it runs
        """
        deadline = time.monotonic() + STOP_TIMEOUT
        self._ptrace(_INTERRUPT)
        if number is not None:
            self._go_on(_CONT, number)
        while not _is_event(status := self._wait(deadline)):
            self._go_on(_CONT, os.WSTOPSIG(status) & ~_SYSGOOD
                        if not _is_call(status) else 0)

    def detach(self) -> None:
        self.give_back()
        self._go_on(_DETACH)

    def give_back(self) -> None:
        """Let it have its own signals blocked again; no call comes after."""
        if self._mask is None or self.own is not None:
            return
        mask, changed = self._mask
        before = self.registers()
        if changed and before.ax == _U64 + 1 - _NO_HANDLER:
            self._begin_again(before)
        self._set_mask(mask)
        self._mask = None

    def _begin_again(self, before: UserRegs) -> None:
        """Bring it to the begin of the call that it has waited in.

        What the call blocks would come now and end it, if the kernel began it
        again with what was blocked before it; and that is what it has to find.
        At its begin no signal comes any more.
        """
        regs = UserRegs.from_buffer_copy(before)
        regs.ip -= len(_INSTRUCTION)
        regs.ax, regs.orig_ax = before.orig_ax, _U64
        self.set_registers(regs)
        self._go_on(_SYSCALL)
        with contextlib.suppress(TimeoutError):
            deadline = time.monotonic() + STOP_TIMEOUT
            while _is_event(status := self._wait(deadline)):
                self._go_on(_SYSCALL)
            if self._is_entry(status):
                return
            self.set_registers(before)
            self._stop(0)
            return
        # Frozen; the kernel begins it.
        self._stop()
        self.set_registers(before)

    def registers(self) -> UserRegs:
        regs = UserRegs()
        self._ptrace(_GETREGS, data=ctypes.byref(regs))
        return regs

    def set_registers(self, regs: UserRegs) -> None:
        self._ptrace(_SETREGS, data=ctypes.byref(regs))

    def call(
        self, number: int, arguments: tuple[int, ...], timeout: float | None
    ) -> int:
        """See :meth:`Thread.call`."""
        if self.own is not None:
            raise OSError(f'thread {self.tid} does not stop')
        deadline = time.monotonic() + (timeout or STOP_TIMEOUT)
        while True:
            self._prepare(number, arguments)
            status, late = self._run(deadline)
            result, fault = self._settle(status)
            if late:
                raise TimeoutError(f'thread {self.tid}: the call takes long')
            if fault:
                raise OSError(f'thread {self.tid} may not make the call')
            # Else a signal has come in its place.
            if _is_call(status) and result not in _RESTARTS:
                return result

    def _prepare(self, number: int, arguments: tuple[int, ...]) -> None:
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
        if self._mask is None:
            # Signals wait, and none comes in the place of the call.
            mask = ctypes.c_uint64()
            self._ptrace(_GETSIGMASK, _MASK_SIZE, ctypes.byref(mask))
            # This is what was blocked before the call that it waits in.
            self._mask = mask.value, mask.value != self._signals('SigBlk')
            self._set_mask(mask.value | (_U64 & ~_FAULTS_MASK))
        self.own = before
        self.set_registers(regs)

    def _signals(self, name: str) -> int:
        """A set of them, of proc_pid_status(5)."""
        # A name may be any bytes, but has no line ends.
        with open(f'/proc/{self.tid}/status', 'rb') as status:
            for line in status:
                if line.startswith(name.encode() + b':'):
                    return int(line.split()[1], 16)
        raise ProcessLookupError(self.tid)

    def _set_mask(self, mask: int) -> None:
        self._ptrace(_SETSIGMASK, _MASK_SIZE,
                     ctypes.byref(ctypes.c_uint64(mask)))

    def _run(self, deadline: float) -> tuple[int, bool]:
        """Let it make its call.

        Not by a single step, whose end is a signal to the thread: that would
        take away the handler of one that has SIGTRAP blocked or ignored.

        :returns: status of the stop, and whether the call was broken off
        :raises TimeoutError: the kernel does not break it off
        """
        late = False
        while True:
            self._go_on(_SYSCALL)
            try:
                status = self._wait(deadline)
            except TimeoutError:
                late = True
                self._ptrace(_INTERRUPT)
                status = self._wait(time.monotonic() + STOP_TIMEOUT)
            # A process that was stopped by a signal stops before the call.
            if _is_event(status) and not late:
                late = time.monotonic() > deadline
                if not late:
                    continue
            if not self._is_entry(status):
                return status, late

    def _settle(self, status: int) -> tuple[int, bool]:
        """Give back what is the thread's.

        :param status: of the stop
        :returns: what the call has returned, if it was made, and whether the
            kernel has sent a signal for it
        """
        assert self.own is not None
        result = int(self.registers().ax)
        self.set_registers(self.own)
        self.own = None
        if _is_call(status):
            # A filter, seccomp(2), sends its signal before the end of the call
            # that it refuses, and it comes after that.
            deadline = time.monotonic() + STOP_TIMEOUT
            while (_is_call(status) or _is_event(status)) and (
                    self._signals('SigPnd') & ~self._signals('SigBlk') &
                    _FAULTS_MASK):
                self._go_on(_CONT)
                status = self._wait(deadline)
        fault = self._is_fault(status)
        if not _is_event(status) and not _is_call(status) and not fault:
            # Its handler comes back with what is blocked now.
            if self._mask is not None:
                self._set_mask(self._mask[0])
                self._mask = None
            self._stop(os.WSTOPSIG(status))
        elif not _is_event(status):
            # From the end of a call it would go on in its own code. Where it
            # was before, the kernel looks whether a call is to begin again.
            self._stop(0)
        return result - (1 << 64) if result >> 63 else result, fault

    def finish(self) -> None:
        """Wait for the end of its call, however long, and let go of it."""
        while self._is_entry(status := self._wait(None)):
            self._go_on(_SYSCALL)
        self._settle(status)
        self.detach()

    def _is_entry(self, status: int) -> bool:
        if not _is_call(status):
            return False
        message = ctypes.c_ulong()
        self._ptrace(_GETEVENTMSG, data=ctypes.byref(message))
        return message.value == _ENTRY

    def _is_fault(self, status: int) -> bool:
        """Whether it stopped for what the kernel thinks of the call."""
        if _is_event(status) or os.WSTOPSIG(status) not in _FAULTS:
            return False
        info = (ctypes.c_int * (_INFO_SIZE // 4))()
        self._ptrace(_GETSIGINFO, data=ctypes.byref(info))
        # si_code: of what processes send to each other it is at most 0.
        return info[2] > 0

    def _instruction(self, ip: int) -> int:
        """Address of a ``syscall`` instruction in its memory."""
        with open(f'/proc/{self.tid}/mem', 'rb', buffering=0) as f:
            with contextlib.suppress(OSError, OverflowError, ValueError):
                f.seek(ip - len(_INSTRUCTION))
                if f.read(len(_INSTRUCTION)) == _INSTRUCTION:
                    return ip - len(_INSTRUCTION)
            start, size = self._vdso()
            f.seek(start)
            at = f.read(size).find(_INSTRUCTION)
            if at < 0:
                raise OSError('no system call instruction in the vDSO')
            return start + at

    def _vdso(self) -> tuple[int, int]:
        # Paths are the guest's, in any bytes, and may end like that too. Those
        # of files begin with "/", and have an inode.
        with open(f'/proc/{self.tid}/maps', 'rb') as maps:
            for line in maps:
                fields = line.rstrip(b'\n').split(None, 5)
                if fields[3:] == [b'00:00', b'0', b'[vdso]']:
                    start, end = (int(n, 16) for n in fields[0].split(b'-'))
                    return start, min(end - start, _VDSO_SIZE)
        raise OSError('no vDSO')


def _is_event(status: int) -> bool:
    return status >> 16 == _EVENT_STOP


def _is_call(status: int) -> bool:
    """Whether it stands at the begin or at the end of a system call."""
    return not status >> 16 and (
        os.WSTOPSIG(status) == signal.SIGTRAP | _SYSGOOD)
