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

"""Terminals whose session CRIU does not see.

CRIU asks the first process that has a terminal open for the terminal's
session, and the kernel tells that only to processes of that session. An init
that keeps the console open, or a daemon that was started from a shell, hides
the session of a shell on the same terminal. Then

* the dump fails if the shell has /dev/tty open ("ctty inheritance
  detected"). So its descriptor becomes one of the terminal itself, which is
  what /dev/tty stands for: :func:`release`.
* the shell would lose its controlling terminal. So the source notes the
  sessions (:func:`sessions`) and the images are corrected: :func:`mend`.

A console that is of no session at all, because nobody has logged in there,
would not be restored ("No task found with sid 0"): its master is held outside
of the container. So the images say that it is the init's, and when the guest
is restored it is taken away from that again (see
:func:`nova_pycontainer.runtime.keeper_console.disown`).
"""

import collections.abc as cabc
import contextlib
import itertools
import os
import pathlib
import re
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import filters
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import imagefile
from nova_pycontainer.runtime.migration import tracer
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

#: TtyType in CRIU's tty.proto
_PTY = 1
#: linux/major.h: UNIX98_PTY_SLAVE_MAJOR and the seven after it
_SLAVES = range(136, 144)
_DEV_TTY = os.makedev(5, 0)
_INIT = 1
#: What processes that share an open file would see of each other.
_SHARED = os.O_ACCMODE | os.O_NONBLOCK | os.O_APPEND | os.O_ASYNC
#: asm/unistd_64.h
_DUP3 = 292
_IDS = re.compile(r'^(NSsid|NSpgid):.*?(\d+)$', re.M)
_FDINFO = re.compile(r'^(flags|mnt_id):\s*(\d+)$', re.M)

#: Number of the terminal in the container → its session, and the process
#: group in its foreground; ids as the container sees them.
Sessions = dict[int, tuple[int, int]]


class _Descriptor(ty.NamedTuple):
    number: int
    device: int
    #: on exec
    closed: bool


class _Process:
    """:raises OSError: it has ended"""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        fields = procfs.text(f'/proc/{pid}/stat').rpartition(')')[2].split()
        # proc_pid_stat(5), from the third field on
        self.group, self.session, self.terminal, self.foreground = (
            int(n) for n in fields[2:6])
        self._started = int(fields[19])

    def same(self) -> '_Process':
        """:raises OSError: it has ended, or has another terminal"""
        now = _Process(self.pid)
        if (now._started, now.session, now.terminal) != (
                self._started, self.session, self.terminal):
            raise OSError('it has changed meanwhile')
        return now

    def has_terminal(self) -> bool:
        return self.terminal > 0 and os.major(self.terminal) in _SLAVES

    def terminals(self) -> cabc.Iterator[_Descriptor]:
        """Those of terminals."""
        kinds = {mount.id: mount.fstype for mount in guest.mounts(self.pid)}
        for fd in os.listdir(f'/proc/{self.pid}/fd'):
            with contextlib.suppress(OSError, KeyError):
                info = dict(_FDINFO.findall(
                    procfs.text(f'/proc/{self.pid}/fdinfo/{fd}')))
                # Others may let us wait for a process of the guest's.
                if kinds.get(int(info['mnt_id'])) in (
                        'devpts', 'devtmpfs', 'tmpfs'):
                    device = os.stat(f'/proc/{self.pid}/fd/{fd}').st_rdev
                    if device:
                        yield _Descriptor(
                            int(fd), device,
                            bool(int(info['flags'], 8) & os.O_CLOEXEC))


def _processes(group: cgroup.Cgroup) -> list[_Process]:
    found = []
    for pid in group.processes():
        with contextlib.suppress(OSError):
            found.append(_Process(pid))
    return found


def release(group: cgroup.Cgroup, frozen: bool) -> None:
    """Make descriptors of /dev/tty ones of the terminal, where CRIU fails.

    :param frozen: the container is frozen, and stays so
    """
    if not tracer.supported():
        return
    wanted: list[tuple[_Process, _Descriptor, _Descriptor]] = []
    open_in: dict[int, set[int]] = {}
    for item in _processes(group):
        with contextlib.suppress(OSError):
            held = list(item.terminals())
            for found in held:
                open_in.setdefault(found.device, set()).add(item.session)
            same = [d for d in held if d.device == item.terminal]
            if item.has_terminal() and same:
                wanted.extend((item, found, same[0]) for found in held
                              if found.device == _DEV_TTY)
    wanted = [w for w in wanted
              if open_in[w[0].terminal] != {w[0].session}]
    if not wanted:
        return
    usual = filters.usual(group)
    with contextlib.ExitStack() as stack:
        held_still = tracer.held_still(group, stack) if frozen else {}
        for item, found, terminal in wanted:
            try:
                with contextlib.ExitStack() as own:
                    threads = held_still if frozen else own.enter_context(
                        tracer.held(item.pid))
                    # It has run until now. What another process does that
                    # shares its descriptors (CLONE_FILES) is not seen.
                    if item.pid not in group.processes():
                        raise ProcessLookupError(item.pid)
                    if not {found, terminal} <= set(item.same().terminals()):
                        raise OSError('it has other files open')
                    filters.check(item.pid, usual)
                    result = threads[item.pid].call(
                        _DUP3, terminal.number, found.number,
                        os.O_CLOEXEC if found.closed else 0)
                if result != found.number:
                    LOG.info('process %d: dup3: %d', item.pid, result)
            except (OSError, KeyError) as e:
                # Then the dump says why it fails.
                LOG.info('process %d keeps /dev/tty open: %s', item.pid, e)


def sessions(group: cgroup.Cgroup) -> Sessions:
    """The sessions that have a terminal."""
    inner: dict[int, int] = {}
    leaders: list[_Process] = []
    # Of all processes: after a restore only the leader of a session has the
    # terminal, and the group in its foreground is of others.
    for item in _processes(group):
        with contextlib.suppress(OSError, KeyError):
            ids = dict(_IDS.findall(procfs.text(f'/proc/{item.pid}/status')))
            inner[item.group] = int(ids['NSpgid'])
            inner[item.session] = int(ids['NSsid'])
            if item.has_terminal():
                leaders.append(item)
    found = {}
    for item in leaders:
        session = inner[item.session]
        if session > 0:
            found[_index(item.terminal)] = (
                session, inner.get(item.foreground, session))
    return found


def mend(
    directory: pathlib.Path, messages: types.ModuleType, known: Sessions
) -> bool:
    """Say in the images which session a terminal is of.

    :param messages: pycriu's module ``images.pb``
    :param known: what :func:`sessions` has found on the source
    :returns: whether one was given to the init, so that it has to be taken
        away again
    """
    path = directory / 'tty-info.img'
    if not path.exists():
        return False
    entries = imagefile.read(path, messages.tty_info_entry)
    masters = {entry.pty.index for entry in entries
               if entry.type == _PTY and not _is_slave(entry)}
    changed = found = False
    for entry in entries:
        if entry.type != _PTY or not _is_slave(entry) or entry.sid:
            continue
        if entry.pty.index in known:
            entry.sid, entry.pgrp = known[entry.pty.index]
            changed = True
            if entry.pty.index not in masters:
                _unpair(directory, messages, entry.id)
        elif entry.pty.index not in masters and _leads_a_session(
                directory, messages):
            entry.sid = entry.pgrp = _INIT
            changed = found = True
    if changed:
        imagefile.write(path, entries)
    return found


def _unpair(
    directory: pathlib.Path, messages: types.ModuleType, terminal: int
) -> None:
    """Let CRIU find a descriptor to make the controlling terminal with.

    CRIU pairs the open files of a pty in the order in which they come, takes
    each pair for a master and a slave, and looks for the master to give the
    terminal to its session. Where there is none, one file has to be without
    a pair. So two that are open in the same way become one, which is as if a
    process had inherited its own from the other.
    """
    path = directory / 'files.img'
    entries = imagefile.read(path, messages.file_entry)
    files = [entry for entry in entries if entry.HasField('tty') and
             entry.tty.tty_info_id == terminal]
    if len(files) % 2:
        return
    for one, other in itertools.combinations(files, 2):
        if one.tty.flags & _SHARED == other.tty.flags & _SHARED:
            break
    else:
        LOG.warning('the session of terminal %#x loses it: the terminal is '
                    'open in different ways', terminal)
        return
    entries.remove(other)
    imagefile.write(path, entries)
    for table in directory.glob('fdinfo-*.img'):
        descriptors = imagefile.read(table, messages.fdinfo_entry)
        if other.id not in (entry.id for entry in descriptors):
            continue
        for entry in descriptors:
            if entry.id == other.id:
                entry.id = one.id
        imagefile.write(table, descriptors)


def _index(device: int) -> int:
    return (os.major(device) - _SLAVES.start) * 256 + os.minor(device)


def _is_slave(entry: ty.Any) -> bool:
    return os.major(entry.rdev) in _SLAVES


def _leads_a_session(
    directory: pathlib.Path, messages: types.ModuleType
) -> bool:
    for entry in imagefile.read(directory / 'pstree.img',
                                messages.pstree_entry):
        if entry.pid == _INIT:
            return bool(entry.sid == _INIT)
    return False
