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

"""Locks of ranges of files, fcntl(2), that CRIU restores and then loses.

It takes them before it maps the files of a process, and a process that closes
any descriptor of a file loses all of its own locks of that file. SQLite holds
one of the file that it maps beside a database with a log written ahead:
without it the next process that opens the database cuts that file, and the
first one dies of SIGBUS.

What is missing is taken again by the processes themselves.
"""

import contextlib
import os
import pathlib
import re
import struct
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime.migration import filters
from nova_pycontainer.runtime.migration import imagefile
from nova_pycontainer.runtime.migration import lazy
from nova_pycontainer.runtime.migration import tracer
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

#: linux/fs.h, as CRIU's images have it.
_FL_POSIX = 1
#: asm/unistd_64.h, fcntl.h
_FCNTL = 72
_ACCESS = 21
_F_SETLK = 6
#: struct flock of x86_64
_FLOCK = struct.Struct('<hh4xqqi4x')
#: Bytes below a thread's stack that it may be using (System V ABI), and more.
_RED_ZONE = 1024
_HELD = re.compile(
    r'^lock:\s+\d+: POSIX +\S+ +(READ|WRITE) +\S+ \S+ (\d+) (\d+|EOF)$', re.M)


class Lock(ty.NamedTuple):
    """One of a process.

    :param pid: in the guest
    :param kind: F_RDLCK (0) or F_WRLCK (1)
    :param length: bytes; 0: to the end, wherever it is
    """

    pid: int
    fd: int
    kind: int
    start: int
    length: int


def read(images: pathlib.Path, messages: types.ModuleType) -> list[Lock]:
    """Those of a dump.

    :param messages: pycriu's module ``images.pb``
    """
    path = images / 'filelocks.img'
    if not path.exists():
        return []
    return [Lock(entry.pid, entry.fd, entry.type, entry.start, entry.len)
            for entry in imagefile.read(path, messages.file_lock_entry)
            if entry.flag & _FL_POSIX]


def restore(
    group: cgroup.Cgroup, locks: list[Lock], late: bool = False
) -> None:
    """Take again what a restored guest does not hold. Never raises.

    :param group: of the guest, frozen or not
    :param late: pages of its memory may be still to come
    """
    if not locks or not tracer.supported():
        return
    try:
        _restore(group, locks, late)
    except Exception:
        # The guest's own values are in it, and there is no way back: whatever
        # it is, it must not end the guest.
        LOG.exception('%s: its locks', group.v2)


def _restore(group: cgroup.Cgroup, locks: list[Lock], late: bool) -> None:
    pids = _pids(group)
    lost = [lock for lock in locks
            if lock.pid in pids and not _holds(pids[lock.pid], lock)]
    if not lost:
        return
    usual = filters.usual(group)
    with contextlib.ExitStack() as stack:
        held: dict[int, tracer.Thread] = {}
        if (group.v2 / 'cgroup.freeze').read_text().strip() == '1':
            held = tracer.held_still(group, stack)
        for lock in lost:
            pid = pids[lock.pid]
            try:
                if pid not in held:
                    held[pid] = stack.enter_context(tracer.stopped(pid))
                filters.check(pid, usual)
                result = _take(held[pid], pid, lock, late)
            except (OSError, OverflowError, ValueError) as e:
                # Its stack pointer may be any number, also one that is no
                # offset of a file.
                LOG.warning('process %d has lost a lock: %s', pid, e)
                continue
            if result < 0:
                LOG.warning('process %d has lost a lock: %s', pid,
                            os.strerror(-result))


def _pids(group: cgroup.Cgroup) -> dict[int, int]:
    """Number in the guest → number here."""
    found = {}
    for pid in group.processes():
        with contextlib.suppress(OSError):
            numbers = process.numbers(pid)
            # Not those of a namespace below the guest's.
            if len(numbers) == 2:
                found[numbers[1]] = pid
    return found


def _holds(pid: int, lock: Lock) -> bool:
    """Whether proc(5) says so, of the descriptor."""
    end = str(lock.start + lock.length - 1) if lock.length else 'EOF'
    try:
        text = procfs.text(f'/proc/{pid}/fdinfo/{lock.fd}')
    except OSError:
        return True
    return (('READ', 'WRITE')[lock.kind == 1], str(lock.start), end) in (
        _HELD.findall(text))


def _take(
    thread: tracer.Thread, pid: int, lock: Lock, late: bool
) -> int:
    # Within one page.
    address = (thread.registers().sp - _RED_ZONE) & -_FLOCK.size
    if late:
        # With post-copy it comes for the process itself, and for nobody who
        # looks into its memory (userfaultfd(2)). This reads from there, and
        # does nothing else. The kernel does not break it off: it ends with
        # the page, or, if that never comes, with the guest.
        thread.call(_ACCESS, address, os.F_OK, timeout=lazy.LONGEST)
    with open(f'/proc/{pid}/mem', 'r+b', buffering=0) as f:
        f.seek(address)
        before = f.read(_FLOCK.size)
        f.seek(address)
        f.write(_FLOCK.pack(
            lock.kind, os.SEEK_SET, lock.start, lock.length, 0))
        try:
            return thread.call(_FCNTL, lock.fd, _F_SETLK, address)
        finally:
            f.seek(address)
            f.write(before)
