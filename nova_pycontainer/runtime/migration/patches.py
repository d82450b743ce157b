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

*Sleeps* are begun again where they were, see :mod:`.registers`.

*Signals.* CRIU dumps a process's signals first and its timers last. A timer
that ends in between is dumped as ended, and its signal is lost. The source
looks for signals when all is dumped; those that the images lack are added.
"""

import collections.abc as cabc
import contextlib
import functools
import itertools
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
from nova_pycontainer.runtime.migration import imagefile
from nova_pycontainer.runtime.migration import registers
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

Facts = cabc.Mapping[str, ty.Any]

_MODE_FILTER = 2
_X86_64 = 1
_COMPAT = 2

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
    for pid in group.processes():
        with contextlib.suppress(OSError):
            for tid in os.listdir(f'/proc/{pid}/task'):
                text = procfs.text(f'/proc/{pid}/task/{tid}/status')
                masks = {n: int(m, 16) for n, m in _PENDING.findall(text)}
                # What is of the process is shown in each of its threads.
                shared = masks['ShdPnd'] if int(tid) == pid else 0
                if masks['SigPnd'] or shared:
                    found.append({
                        'tid': clocks.inner_pid(int(tid)),
                        'thread': masks['SigPnd'], 'process': shared})
    return found


class _Core:
    """core-<tid>.img of a thread; of a process too, if it is the first."""

    def __init__(
        self, path: pathlib.Path, kind: cabc.Callable[[], ty.Any]
    ) -> None:
        self._path = path
        self.entry = imagefile.read(path, kind)[0]
        self.changed = False

    def save(self) -> None:
        if self.changed:
            imagefile.write(self._path, [self.entry])


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
                if core.entry.mtype != _X86_64:
                    continue
                regs = core.entry.thread_info.gpregs
                core.changed |= registers.Registers(
                    regs, self._asleep.get(tid),
                    self._filters(core, leader) == usual, self._now,
                    _interrupted(core, leader),
                    regs.mode == _COMPAT).patch()
            for core in cores.values():
                core.save()
                changed += core.changed
        return changed

    @functools.cached_property
    def _seccomp(self) -> list[ty.Any]:
        try:
            entries = imagefile.read(self._directory / 'seccomp.img',
                                     self._messages.seccomp_entry)
        except FileNotFoundError:
            return []
        return list(entries[-1].seccomp_filters) if entries else []

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
            for entry in imagefile.read(path, self._messages.timens_entry):
                return int(entry.monotonic.tv_sec * 10 ** 9 +
                           entry.monotonic.tv_nsec)
        return None

    def _processes(self) -> cabc.Iterator[list[int]]:
        for entry in imagefile.read(self._directory / 'pstree.img',
                                    self._messages.pstree_entry):
            # The first thread's number is the process's.
            yield sorted(entry.threads, key=lambda t: t != entry.pid)

    def _core(self, tid: int) -> _Core | None:
        try:
            core = _Core(self._directory / f'core-{tid}.img',
                         self._messages.core_entry)
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


def _interrupted(core: _Core, leader: _Core) -> bool:
    """Whether a signal waits that the thread has a handler for."""
    thread = core.entry.thread_core
    process = leader.entry.tc
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
