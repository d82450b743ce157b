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

"""Registers of a thread whose sleep CRIU has ended, on x86.

A thread that CRIU stops in a call whose rest the kernel would continue
(ERESTART_RESTARTBLOCK) goes on as one whose call has failed with EINTR, which
it never does without a signal's handler: ``sleep 1000`` would end at once.
That is so on the destination, and on the source after a dump that was given
up. So the call is begun again:

nanosleep, clock_nanosleep
    The kernel has written what is left to the third (or second) address; if
    there is one, it becomes the request. Else poll with as many milliseconds
    as are left takes its place: it waits as well and takes its time from a
    register, and the memory of the guest is not ours to change.
    clock_nanosleep to an absolute time and select are begun again by CRIU.
poll, epoll_wait, epoll_pwait
    Again, with what is left. epoll_wait would be allowed to fail with EINTR,
    and does so if what is left is not known.
futex
    FUTEX_WAIT_BITSET, whose time-out is absolute: again. FUTEX_WAIT, whose
    one is relative: returns 0, as if woken. Every user of it has to look at
    the futex then, and counts its time anew.
semop, epoll_pwait2, sigtimedwait, io_getevents
    These fail with EINTR whenever the process is stopped. Again if they wait
    without limit; else their EINTR is one that programs must be ready for.

A signal that has arrived and will be handled makes the call fail with EINTR,
as it would have done; for select, pause and their like CRIU forgets that.

On arm64 the kernel rewinds the thread to the call before a debugger may look,
so that CRIU has every call begun again, with the whole of its time where the
program gave no address for the rest. Which call it was, or that it was
begun at all, the registers do not tell: nothing is changed there.
"""

import collections.abc as cabc
import errno
import math
import typing as ty

from nova_pycontainer.runtime.migration import sleepers

Facts = cabc.Mapping[str, ty.Any]

_EINTR = (1 << 64) - errno.EINTR
_U64 = (1 << 64) - 1

_ARGUMENTS = {
    False: ('di', 'si', 'dx', 'r10', 'r8', 'r9'),
    True: ('bx', 'cx', 'dx', 'si', 'di', 'bp'),
}
#: asm/unistd_32.h → its 64-bit sibling, same arguments
_SIBLINGS = {
    162: sleepers.NANOSLEEP, 267: sleepers.CLOCK_NANOSLEEP,
    407: sleepers.CLOCK_NANOSLEEP, 168: sleepers.POLL, 240: sleepers.FUTEX,
    422: sleepers.FUTEX, 256: sleepers.EPOLL_WAIT,
    319: sleepers.EPOLL_PWAIT, 0: sleepers.RESTART,
}
_SEMOP, _SEMTIMEDOP, _SIGTIMEDWAIT, _IO_GETEVENTS = 65, 220, 128, 208
_IO_PGETEVENTS, _EPOLL_PWAIT2 = 333, 441
#: Call → which argument is its time-out's address.
_ENDLESS = {_SEMTIMEDOP: 3, _SIGTIMEDWAIT: 2, _IO_GETEVENTS: 4,
            _IO_PGETEVENTS: 4, _EPOLL_PWAIT2: 3}
#: select, pselect6, ppoll, pause: ERESTARTNOHAND
_NO_HANDLER = frozenset([23, 270, 271, 34])
_POLL_MAX = (1 << 31) - 1
_CLOCKS = frozenset([0, 1, 7])
_FUTEX_WAIT, _FUTEX_WAIT_BITSET = 0, 9


class Registers:
    """The registers of one thread.

    :param regs: with the names of ``user_regs_struct``, and ``compat``:
        whether it runs 32-bit code
    :param asleep: see :meth:`.sleepers.Sleepers.frozen`
    :param usual_filter: whether it has the seccomp filter of the container
        and no other, which might forbid another call
    :param now: the guest's CLOCK_MONOTONIC, in ns
    :param interrupted: whether a signal waits that it has a handler for
    """

    def __init__(
        self, regs: ty.Any, asleep: Facts | None, usual_filter: bool,
        now: int | None, interrupted: bool, compat: bool,
    ) -> None:
        self._regs = regs
        self._asleep = asleep or {}
        self._usual_filter = usual_filter
        self._interrupted = interrupted
        self._compat = compat
        self._changed = False
        since = self._asleep.get('since')
        self._slept = (None if since is None or now is None
                       else max(now - int(since), 0))

    def patch(self) -> bool:
        """:returns: whether something was changed"""
        regs = self._regs
        if regs.orig_ax >> 63:
            # In no system call.
            return False
        ax = regs.ax & _U64
        if self._compat:
            ax |= 0xFFFFFFFF << 32 if ax >> 31 & 1 else 0
        call = self._call()
        if ax == _EINTR:
            if call is not None and not self._interrupted:
                self._again(call)
        elif ax == regs.orig_ax and call in _NO_HANDLER and (
                self._interrupted):
            # Undo what CRIU has done.
            regs.ax = _EINTR if not self._compat else _EINTR & 0xFFFFFFFF
            regs.ip += 2
            self._changed = True
        return self._changed

    def _call(self) -> int | None:
        """The number, on x86_64, of the call that the thread is in."""
        call = int(self._regs.orig_ax) & 0xFFFFFFFF
        if self._compat:
            sibling = _SIBLINGS.get(call)
            if sibling is None:
                return None
            call = sibling
        if call == sleepers.RESTART:
            call = int(self._asleep.get('call', call))
        return call

    def _get(self, index: int) -> int:
        value = int(getattr(self._regs, _ARGUMENTS[self._compat][index]))
        return value & 0xFFFFFFFF if self._compat else value

    def _set(self, index: int, value: int) -> None:
        setattr(self._regs, _ARGUMENTS[self._compat][index], value)

    def _again(self, call: int) -> None:
        """Let the thread begin its call once more."""
        number: int | None = int(self._regs.orig_ax)
        if number in (sleepers.RESTART, 0):
            number = None
        if call == sleepers.NANOSLEEP:
            number = self._sleep(number or call, 0, 1)
        elif call == sleepers.CLOCK_NANOSLEEP:
            if self._get(1) & 1:
                # Absolute; only a signal makes that fail.
                return
            number = self._sleep(
                number or call, 2, 3, self._get(0) in _CLOCKS)
        elif call == sleepers.POLL:
            self._wait(2)
        elif call in (sleepers.EPOLL_WAIT, sleepers.EPOLL_PWAIT):
            if not self._wait(3):
                return
        elif call == sleepers.FUTEX:
            operation = self._get(1) & 127
            if operation == _FUTEX_WAIT:
                self._regs.ax = 0
                self._changed = True
            if operation != _FUTEX_WAIT_BITSET:
                return
        elif call == _SEMOP or call in _ENDLESS:
            if call in _ENDLESS and self._get(_ENDLESS[call]):
                return
        else:
            return
        if number is None:
            number = call
            if self._compat:
                number = next(n for n, s in _SIBLINGS.items() if s == call)
        self._regs.ax = number
        # Both "syscall" and "int $0x80" have two bytes.
        self._regs.ip -= 2
        self._changed = True

    def _sleep(
        self, number: int, request: int, rest: int, steady: bool = True
    ) -> int:
        """:returns: the call that waits for what is left"""
        if self._get(rest):
            self._set(request, self._get(rest))
            return number
        asked = self._asleep.get('asked')
        if asked is None or self._slept is None or self._compat or (
                not steady or not self._usual_filter):
            # It sleeps the whole of its time again.
            return number
        left = math.ceil(max(int(asked) - self._slept, 0) / 1_000_000)
        if left > _POLL_MAX:
            return number
        for index, value in enumerate((0, 0, left)):
            self._set(index, value)
        return sleepers.POLL

    def _wait(self, index: int) -> bool:
        """Shorten a time-out in ms by what is over.

        :returns: whether that is known
        """
        left = self._get(index) & 0xFFFFFFFF
        if left >> 31:
            return True
        if self._slept is None:
            return False
        self._set(index, max(left - self._slept // 1_000_000, 0))
        return True
