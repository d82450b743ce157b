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

"""What the source of a pass says before rsync does: which files to look into.

Records end with NUL::

    d INODE 0 MTIME CTIME NAME          a directory
    TYPE INODE LINKS SIZE CTIME NAME    another file that changed, or that
                                        has several names; CTIME 0: it did not
                                        change
    end STATUS KIND TIME                the last one

TYPE is find's ``%y``, STATUS find's exit code, KIND "all" (any file may have
changed) or "since", TIME the source's time when the pass began.
"""

import collections.abc as cabc
import dataclasses
import errno
import os
import secrets
import select
import socket
import stat
import time
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import syscalls

#: Seconds. Times of files come from a clock that ticks slower than the one
#: that we read.
CLOCK_MARGIN: ty.Final = 1.0

#: Writes the preamble of the working directory, then becomes the program that
#: follows. $1: "sync" or nothing; $2: KIND; $3: the time since when changes
#: count, as "@SECONDS"; $4: TIME.
SCRIPT: ty.Final = r"""
if [ "$1" = sync ]; then sync -f . || exit; fi
find . -ignore_readdir_race \
    -type d -printf 'd %i 0 %T@ %C@ %P\0' -o \
    ! -type c ! -type b \( \
        -type f -newerct "$3" -printf 'f %i %n %s %C@ %P\0' -o \
        -links +1 -printf '%y %i %n %s 0 %P\0' \)
printf 'end %d %s %s\0' $? "$2" "$4"
shift 4
exec "$@"
"""

_CHUNK: ty.Final = 64 << 10
_MAX_BYTES: ty.Final = 256 << 20
#: Errors of opening what is something else, or not there.
_NOT_THERE: ty.Final = (
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR,
    errno.EXDEV)


class Changed(ty.NamedTuple):
    """A regular file that changed. ``state`` tells one of its changes from
    all others.
    """

    size: int
    ctime: float
    state: bytes


class Directory(ty.NamedTuple):
    """``attributes``: the last change was not one of its entries, but of its
    own name, owner or so.
    """

    inode: bytes
    ctime: float
    attributes: bool


@dataclasses.dataclass
class Preamble:
    """What the source says of its files.

    :param everything: any file may have changed
    :param complete: the source could read all of its directories
    :param time: when the source began, seconds by its clock
    :param links: names of files with several names, and their inodes there
    """

    everything: bool = False
    complete: bool = True
    time: float = 0.0
    directories: dict[bytes, Directory] = dataclasses.field(
        default_factory=dict)
    changed: dict[bytes, Changed] = dataclasses.field(default_factory=dict)
    links: dict[bytes, bytes] = dataclasses.field(default_factory=dict)

    def _add(self, record: bytes) -> bool:
        """:returns: whether it was the last one"""
        kind, *rest = record.split(b' ', 5)
        if kind == b'end':
            status, scope, time = rest
            self.complete = status == b'0'
            self.everything = scope == b'all'
            self.time = float(time)
            return True
        inode, links, size, ctime, name = rest
        if kind == b'd':
            self.directories[name] = Directory(
                inode, float(ctime), size != ctime)
            return False
        if links != b'1':
            self.links[name] = inode
        if ctime != b'0':
            self.changed[name] = Changed(
                int(size), float(ctime), inode + b' ' + ctime)
        return False

    def unseen(
        self, earlier: 'Preamble'
    ) -> tuple[dict[bytes, Changed], list[bytes]]:
        """What has to be looked into, and was not after an earlier preamble.

        :returns: files, and directories with the files right in them. One
            directory may have taken the name of another, with files that
            have not changed since long ago.
        """
        until = earlier.time - CLOCK_MARGIN
        files = {
            name: file for name, file in self.changed.items()
            if file.ctime > until or earlier.changed.get(name) != file}
        directories = []
        for name, now in self.directories.items():
            before = earlier.directories.get(name)
            if before is None or before.inode != now.inode or (
                    now.attributes and now.ctime > until):
                directories.append(name)
        return files, directories

    @classmethod
    def read(
        cls, sock: socket.socket, deadline: float,
        idle_timeout: float | None,
    ) -> 'Preamble':
        """Read up to the end, and no byte of what follows.

        :param deadline: by the monotonic clock
        :param idle_timeout: seconds without a byte; None: no limit, since
            the source first writes its dirty pages to disk
        :raises ContainerError: ``timeout``, ``network``
        """
        preamble = cls()
        carry = b''
        total = 0
        while True:
            chunk = _peek(sock, deadline, idle_timeout)
            total += len(chunk)
            if not chunk or total > _MAX_BYTES:
                raise _broken('the source went away' if not chunk else
                              'the list of changed files is too long')
            start = 0
            last = False
            while not last and (end := chunk.find(0, start)) >= 0:
                try:
                    last = preamble._add(carry + chunk[start:end])
                except (ValueError, IndexError) as e:
                    raise _broken(
                        f'the list of changed files is damaged ({e})') from e
                carry = b''
                start = end + 1
            if not last:
                carry += chunk[start:]
                start = len(chunk)
            while start:
                start -= len(sock.recv(start))
            if last:
                return preamble


def _peek(
    sock: socket.socket, deadline: float, idle_timeout: float | None
) -> bytes:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    patience = deadline - time.monotonic()
    if idle_timeout is not None:
        patience = min(patience, idle_timeout)
    if not poll.poll(max(patience, 0) * 1000):
        raise errors.ContainerError(
            'timeout', 'the source does not say which files have changed',
            remedy='Look at the load of the source and of its disk')
    # What follows the preamble is for rsync: look first, then take.
    try:
        return sock.recv(_CHUNK, socket.MSG_PEEK)
    except ConnectionError:
        return b''


def _broken(cause: str) -> errors.ContainerError:
    return errors.ContainerError(
        'network', 'the copy of the files was cut off', cause=cause,
        remedy='See the log of pycontainer-agent on the source')


def spoil(
    root: int, files: cabc.Mapping[bytes, Changed],
    directories: cabc.Iterable[bytes],
) -> None:
    """Make rsync look into files whose size and time may be the same.

    :param root: a descriptor of the destination's directory
    :param directories: all files right in one of these
    """
    for name in directories:
        try:
            directory = _open(
                root, name or b'.', os.O_RDONLY | os.O_DIRECTORY)
        except OSError as e:
            if e.errno in _NOT_THERE:
                continue
            raise
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        _spoil(directory, os.fsencode(entry.name))
        finally:
            os.close(directory)
    for name, file in files.items():
        _spoil(root, name, file.size)


def _spoil(root: int, name: bytes, size: int | None = None) -> None:
    try:
        fd = _open(root, name, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as e:
        if e.errno in _NOT_THERE:
            return
        raise
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            return
        if size is not None and info.st_size > size:
            # Its space may be needed by another file.
            os.ftruncate(fd, size)
        # A time that it never had, and never will have.
        os.utime(fd, ns=(info.st_atime_ns, secrets.randbelow(1 << 60)))
    finally:
        os.close(fd)


def _open(root: int, name: bytes, flags: int) -> int:
    return syscalls.openat2(
        root, os.fsdecode(name), flags,
        syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS |
        syscalls.RESOLVE_NO_XDEV)
