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

"""Corrections of CRIU's images, between their arrival and the restore.

*Sleeps.* A thread that CRIU stops in a call whose rest the kernel would
continue (ERESTART_RESTARTBLOCK) is dumped as one whose call has failed with
EINTR, which it never does without a signal's handler: ``sleep 1000`` would
end at once. So, on x86, the call is begun again:

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

*Signals.* CRIU dumps a process's signals first and its timers last. A timer
that ends in between is dumped as ended, and its signal is lost. The source
looks for signals when all is dumped; those that the images lack are added.
"""

import collections.abc as cabc
import contextlib
import errno
import functools
import itertools
import math
import os
import pathlib
import re
import signal
import struct
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import clocks
from nova_pycontainer.runtime.migration import sleepers

LOG = logging.getLogger(__name__)

Facts = cabc.Mapping[str, ty.Any]

_MAGIC = 8
_EINTR = (1 << 64) - errno.EINTR
_MODE_FILTER = 2
_U64 = (1 << 64) - 1
_X86_64 = 1
_COMPAT = 2

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

#: Never of the guest's: how processes are stopped and inspected.
_NOT_ADDED = frozenset([
    signal.SIGKILL, signal.SIGSTOP, signal.SIGTRAP, signal.SIGSEGV,
    signal.SIGBUS, signal.SIGILL, signal.SIGFPE])
_SI_KERNEL, _SI_TIMER = 0x80, -2
_SIGINFO = 128

_PENDING = re.compile(r'^(SigPnd|ShdPnd):\s*([0-9a-f]+)$', re.M)


def pending(group: cgroup.Cgroup) -> list[dict[str, ty.Any]]:
    """Signals that wait in the processes of a dumped container.

    :returns: masks of process and threads, by their ids in the container
    """
    found = []
    for pid in clocks.processes(group):
        with contextlib.suppress(OSError):
            for tid in os.listdir(f'/proc/{pid}/task'):
                with open(f'/proc/{pid}/task/{tid}/status') as f:
                    text = f.read()
                masks = {n: int(m, 16) for n, m in _PENDING.findall(text)}
                # What is of the process is shown in each of its threads.
                shared = masks['ShdPnd'] if int(tid) == pid else 0
                if masks['SigPnd'] or shared:
                    found.append({
                        'tid': clocks.inner_pid(int(tid)),
                        'thread': masks['SigPnd'], 'process': shared})
    return found


def _messages(data: bytes) -> cabc.Iterator[bytes]:
    """The messages of an image: two words of magic, then size and message.
    """
    position = _MAGIC
    while position < len(data):
        size, = struct.unpack_from('<I', data, position)
        position += 4
        yield data[position:position + size]
        position += size


class _Core:
    """core-<tid>.img of a thread; of a process too, if it is the first."""

    def __init__(self, path: pathlib.Path, entry: ty.Any) -> None:
        self._path = path
        data = path.read_bytes()
        self._head = data[:_MAGIC]
        entry.ParseFromString(next(_messages(data)))
        self.entry = entry
        self.changed = False

    def save(self) -> None:
        if self.changed:
            data = self.entry.SerializeToString()
            self._path.write_bytes(
                self._head + struct.pack('<I', len(data)) + data)


class Patches:
    """The images of one container.

    :param messages: pycriu's module ``images.pb``
    :param asleep: see :meth:`.sleepers.Sleepers.frozen`
    :param signals: see :func:`pending`
    """

    def __init__(
        self, directory: pathlib.Path, messages: types.ModuleType,
        asleep: cabc.Iterable[Facts], signals: cabc.Iterable[Facts],
    ) -> None:
        self._directory = directory
        self._messages = messages
        self._asleep = {int(s['tid']): s for s in asleep}
        self._signals = {int(s['tid']): s for s in signals}

    def apply(self) -> int:
        """Correct what has to be.

        :returns: how many threads were changed
        """
        changed = 0
        usual = None
        for tids in self._processes():
            cores = {t: c for t in tids if (c := self._core(t)) is not None}
            if not cores:
                # A zombie's has no registers, and it needs none.
                continue
            leader = next(iter(cores.values()))
            if usual is None:
                # The init's filters are the container's.
                usual = self._filters(leader, leader)
            for tid, core in cores.items():
                self._add_signals(tid, core, leader)
            for tid, core in cores.items():
                if core.entry.mtype == _X86_64:
                    _Thread(core, leader, self._asleep.get(tid),
                            self._filters(core, leader) == usual,
                            self._now).patch()
            for core in cores.values():
                core.save()
                changed += core.changed
        return changed

    @functools.cached_property
    def _seccomp(self) -> list[ty.Any]:
        try:
            data = (self._directory / 'seccomp.img').read_bytes()
        except FileNotFoundError:
            return []
        entry = self._messages.seccomp_entry()
        for message in _messages(data):
            entry.ParseFromString(message)
        return list(entry.seccomp_filters)

    def _filters(self, core: _Core, leader: _Core) -> tuple[bytes, ...]:
        """The programs that filter a thread's calls, the last one first.

        CRIU writes those of each process on their own, and of threads that
        have the same as their process nothing.
        """
        thread = core.entry.thread_core
        if thread.seccomp_mode != _MODE_FILTER:
            thread = leader.entry.thread_core
        found: list[bytes] = []
        index = thread.seccomp_filter
        while thread.seccomp_mode == _MODE_FILTER and (
                len(found) < len(self._seccomp)):
            item = self._seccomp[index]
            found.append(item.filter)
            if not item.HasField('prev'):
                break
            index = item.prev
        return tuple(found)

    @functools.cached_property
    def _now(self) -> int | None:
        """The guest's CLOCK_MONOTONIC at the dump, in ns."""
        for path in self._directory.glob('timens-*.img'):
            for message in _messages(path.read_bytes()):
                entry = self._messages.timens_entry()
                entry.ParseFromString(message)
                return int(entry.monotonic.tv_sec * 10 ** 9 +
                           entry.monotonic.tv_nsec)
        return None

    def _processes(self) -> cabc.Iterator[list[int]]:
        data = (self._directory / 'pstree.img').read_bytes()
        for message in _messages(data):
            entry = self._messages.pstree_entry()
            entry.ParseFromString(message)
            # The first thread's number is the process's.
            yield sorted(entry.threads, key=lambda t: t != entry.pid)

    def _core(self, tid: int) -> _Core | None:
        try:
            core = _Core(self._directory / f'core-{tid}.img',
                         self._messages.core_entry())
        except FileNotFoundError:
            return None
        return core

    def _add_signals(self, tid: int, core: _Core, leader: _Core) -> None:
        facts = self._signals.get(tid)
        if facts is None:
            return
        timers = leader.entry.tc.timers.posix
        for mask, queue, owner in (
            (int(facts['thread']), core.entry.thread_core.signals_p, core),
            (int(facts['process']), leader.entry.tc.signals_s, leader),
        ):
            have = {_signo(s.siginfo) for s in queue.signals}
            for number in range(1, 65):
                if mask >> (number - 1) & 1 and number not in have and (
                        number not in _NOT_ADDED):
                    LOG.info('signal %d of %d came while it was dumped',
                             number, tid)
                    queue.signals.add(siginfo=_siginfo(number, timers))
                    owner.changed = True


def _signo(siginfo: bytes) -> int:
    return int.from_bytes(siginfo[:4], 'little')


def _siginfo(number: int, timers: cabc.Iterable[ty.Any]) -> bytes:
    """siginfo_t, as far as it can be known."""
    for timer in timers:
        ended = not timer.vsec and not timer.vnsec
        if timer.si_signo == number and (
                ended or timer.isec or timer.insec):
            return struct.pack(
                '<iiixxxxIiQ', number, 0, _SI_TIMER, timer.it_id, 0,
                timer.sival_ptr).ljust(_SIGINFO, b'\0')
    return struct.pack('<iii', number, 0, _SI_KERNEL).ljust(_SIGINFO, b'\0')


class _Thread:
    """The registers of one thread on x86."""

    def __init__(
        self, core: _Core, leader: _Core, asleep: Facts | None,
        usual_filter: bool, now: int | None,
    ) -> None:
        self._core = core
        self._leader = leader
        self._asleep = asleep or {}
        self._usual_filter = usual_filter
        self._regs = core.entry.thread_info.gpregs
        self._compat = self._regs.mode == _COMPAT
        since = self._asleep.get('since')
        #: In ns, at the dump; its clock goes on from there.
        self._slept = (None if since is None or now is None
                       else max(now - int(since), 0))

    def patch(self) -> None:
        regs = self._regs
        if regs.orig_ax >> 63:
            # In no system call.
            return
        ax = regs.ax & _U64
        if self._compat:
            ax |= 0xFFFFFFFF << 32 if ax >> 31 & 1 else 0
        call = self._call()
        if ax == _EINTR:
            if call is not None and not self._interrupted():
                self._again(call)
        elif ax == regs.orig_ax and call in _NO_HANDLER and (
                self._interrupted()):
            # Undo what CRIU has done.
            regs.ax = _EINTR if not self._compat else _EINTR & 0xFFFFFFFF
            regs.ip += 2
            self._core.changed = True

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

    def _interrupted(self) -> bool:
        """Whether a signal waits that the thread has a handler for."""
        thread = self._core.entry.thread_core
        process = self._leader.entry.tc
        blocked = (thread if thread.HasField('blk_sigset')
                   else process).blk_sigset
        actions = process.sigactions
        for item in itertools.chain(
                thread.signals_p.signals, process.signals_s.signals):
            number = _signo(item.siginfo)
            if blocked >> (number - 1) & 1:
                continue
            # SIGKILL and SIGSTOP have no entry.
            index = number - 1 - (number > signal.SIGKILL) - (
                number > signal.SIGSTOP)
            if index >= len(actions) or actions[index].sigaction > 1:
                return True
        return False

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
                self._core.changed = True
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
        self._core.changed = True

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
