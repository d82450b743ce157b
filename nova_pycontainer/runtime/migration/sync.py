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

"""Copy a container's own files (the overlay's upper) to another host.

rsync does it: its daemon on the source, locked into the directory by
chroot(2), because the guest changes that directory while it is read; its
client on the destination, where the directory is at rest. Both talk through
sockets that the caller connects.

A copy is made in passes. The first one copies all, the next ones what has
changed since, the last one runs while the guest is frozen and must find
everything. rsync skips a file whose size and time of modification are the
same on both sides. That misses

* contents that were replaced and the time set back (``cp -p``, packages whose
  files all have one time),
* stores through a shared mapping: the kernel takes the time when a page
  becomes dirty, not at the stores that follow until it has been written out,
* hard links that were separated: the destination's names would stay linked,
  and one would be written through the other.

So each pass but the first begins with a *preamble* from the source: the files
whose inodes have changed (ctime, which no guest can set) since the pass before
began, and the hard links. The destination spoils the time of the former, so
that rsync compares their contents, and separates what is no longer linked.
Each pass but the last begins by writing dirty pages out, so that stores from
then on are seen.
"""

import dataclasses
import errno
import os
import pathlib
import re
import secrets
import select
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import syscalls

LOG = logging.getLogger(__name__)

_CONFIG = pathlib.Path(__file__).with_name('rsyncd.conf')
_PATH_VARIABLE = 'PYCONTAINER_SYNC_PATH'
_RSYNC = 'rsync'
_KILL_TIMEOUT = 10.0
_OUTPUT_TAIL = 32 << 10
#: Seconds. Times of files come from a clock that ticks slower than the one
#: that we read.
_CLOCK_MARGIN = 1.0
_NICE = ('nice', '-n', '10')

#: Attributes that stay on their host. The three of overlayfs name inodes of
#: the source's file systems. Access control lists go another way (-A), and
#: security labels belong to the policy of a host; capabilities to the guest.
_XATTR_FILTERS = (
    '-x trusted.overlay.origin', '-x trusted.overlay.uuid',
    '-x trusted.overlay.nlink', '+x security.capability', '-x security.*',
    '-x system.*')

#: Runs as rsync's remote shell: it connects rsync's pipes with the socket.
#: It ends when the other side does, as ssh would.
_CONNECT = ("sh -c 'exec 3<&0 2>/dev/null; cat <&3 >&7 3<&- & "
            "exec cat <&7 3<&- 7<&-'")

#: The source: preamble, then the daemon. $1: "sync" or nothing; $2: "all", or
#: the time since when changes count.
_SERVE = r"""
if [ "$1" = sync ]; then sync -f . || exit; fi
if [ "$2" = all ]; then
    printf 'all\0'
else
    find . -ignore_readdir_race ! -type d ! -type c ! -type b \( \
        -type f -newerct "$2" -printf '%y %i %n %s 1 %P\0' -o \
        -links +1 -printf '%y %i %n %s 0 %P\0' \)
    printf 'end %d\0' $?
fi
shift 2
exec "$@"
"""
_CHUNK = 64 << 10
_MAX_PREAMBLE = 256 << 20
#: Errors of opening what is not a regular file, or not there.
_NOT_A_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO,
               errno.EISDIR, errno.EXDEV)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A moment on this host: seconds, by two clocks."""

    realtime: float
    monotonic: float

    @classmethod
    def now(cls) -> 'Mark':
        return cls(time.time(), time.monotonic())

    def earliest(self) -> float:
        """No file that changed after this moment has an earlier ctime, even
        if the clock was set back since.
        """
        now = Mark.now()
        step = (now.realtime - self.realtime) - (
            now.monotonic - self.monotonic)
        return self.realtime + min(step, 0.0) - _CLOCK_MARGIN


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one pass did. Sizes are bytes.

    :param complete: every file was copied as it was; otherwise some changed
        or vanished meanwhile, and another pass is needed
    :param received: bytes that came over the connection
    """

    complete: bool
    files: int
    transferred: int
    created: int
    deleted: int
    total_bytes: int
    literal_bytes: int
    received: int
    seconds: float

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


class _Process:
    """A child and its children, in a session of their own."""

    def __init__(
        self, argv: ty.Sequence[str], sock: socket.socket, *,
        cwd: pathlib.Path, talks: bool, env: dict[str, str] | None = None,
    ) -> None:
        """
        :param sock: becomes its stdin, and stdout too if it ``talks``
        """
        # Files, not pipes: nobody has to read along, whatever is said.
        self._out = tempfile.TemporaryFile()
        self._err = tempfile.TemporaryFile()
        try:
            self._child: subprocess.Popen[bytes] = subprocess.Popen(
                argv, stdin=sock.fileno(),
                stdout=(sock if talks else self._out).fileno(),
                stderr=self._err.fileno(), cwd=cwd, start_new_session=True,
                env={'PATH': os.environ.get('PATH', os.defpath),
                     'LC_ALL': 'C', **(env or {})})
        except BaseException:
            self._out.close()
            self._err.close()
            raise
        self._pidfd = os.pidfd_open(self._child.pid)
        self._lock = threading.Lock()

    def wait(self, timeout: float) -> bool:
        """Whether it has ended, after ``timeout`` seconds at most."""
        return self._child.returncode is not None or process.exited(
            self._pidfd, max(timeout, 0.0))

    def kill(self) -> int:
        """End it and all of its children. Idempotent.

        :returns: the exit code, negative for a signal
        """
        with self._lock:
            if self._child.returncode is None:
                # Not reaped yet, so the number of its group is still its own.
                os.killpg(self._child.pid, signal.SIGKILL)
            return self._child.wait(_KILL_TIMEOUT)

    def output(self) -> str:
        """The end of what it said on stdout."""
        return _tail(self._out)

    def complaint(self) -> str:
        """The end of what it said on stderr."""
        return _tail(self._err)

    def close(self) -> None:
        self.kill()
        with self._lock:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
                self._out.close()
                self._err.close()


def _tail(file: ty.IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(
        file.fileno(), _OUTPUT_TAIL, max(size - _OUTPUT_TAIL, 0)
    ).decode('utf-8', 'replace')


class Server:
    """The source's end of one pass. It ends when the pass does."""

    def __init__(
        self, upper: pathlib.Path, sock: socket.socket, *,
        since: Mark | None, final: bool,
    ) -> None:
        now = Mark.now()
        #: What the next pass has to be told as ``since``. A pass without the
        #: writing out of dirty pages does not see later stores to them.
        self.mark = now if since is None or not final else since
        argv = [
            'sh', '-c', _SERVE, 'sh', '' if final else 'sync',
            'all' if since is None else f'@{since.earliest():.3f}',
            _RSYNC, '--server', '--daemon', f'--config={_CONFIG}', '.']
        self._process = _Process(
            argv if final else [*_NICE, *argv], sock, cwd=upper, talks=True,
            env={_PATH_VARIABLE: str(upper)})

    def close(self) -> None:
        """Stop serving. Idempotent."""
        code = self._process.kill()
        if code:
            LOG.debug('the serving rsync ended with %d', code)
        self._process.close()


def serve(
    upper: pathlib.Path, sock: socket.socket, *,
    since: Mark | None = None, final: bool = False,
) -> Server:
    """Let the other end of ``sock`` read the directory, once.

    :param sock: a connected stream; the caller may close it at once
    :param since: ``mark`` of the server of the pass before; None copies all
    :param final: the guest is frozen
    :returns: to be closed when the other end has what it wants
    """
    return Server(upper, sock, since=since, final=final)


def fetch(
    sock: socket.socket, upper: pathlib.Path, *,
    final: bool = False, timeout: float = 3600.0,
    idle_timeout: float = 60.0,
) -> Stats:
    """Make ``upper`` the same as the directory served at ``sock``.

    ``upper`` is not mounted as part of an overlay, and nobody else changes
    it. To stop early, shut the socket down.

    :param final: the source is at rest, so the copy must be complete
    :param timeout: seconds for all of it
    :param idle_timeout: seconds without anything received or sent
    :raises ContainerError: ``no_space``, ``network`` (the other side went
        away), ``timeout``, ``internal``; the directory's state is undefined
        then, but for another pass
    """
    started = time.monotonic()
    deadline = started + timeout
    options = _prepare(sock, upper, final, deadline, idle_timeout)
    rsync = [
        _RSYNC, '-aHAXS', '--numeric-ids', '--inplace', '--delete',
        '--stats', '--no-human-readable', '--open-noatime',
        f'--timeout={max(1, round(idle_timeout))}', *options,
        *(f'--filter={rule}' for rule in _XATTR_FILTERS),
        '--blocking-io', '-e', _CONNECT, 'source::files/', f'{upper}/']
    argv = ['sh', '-c', 'exec "$@" 7<&0 </dev/null', 'sh', *rsync]
    child = _Process(
        argv if final else [*_NICE, *argv], sock, cwd=pathlib.Path('/'),
        talks=False)
    try:
        ended = child.wait(deadline - time.monotonic())
        code = child.kill()
        complaint = child.complaint()
        if not ended:
            raise _timeout('the copy of the files', timeout)
        _judge(code, complaint, final)
        return _stats(
            child.output(), code == 0, time.monotonic() - started)
    finally:
        child.close()


@dataclasses.dataclass
class _Preamble:
    """What the source says of its files before the copy.

    :param everything: any file may have changed
    :param complete: the source could read all of its directories
    :param changed: regular files that changed, and their sizes
    :param links: names of files with several names, and their inodes there
    """

    everything: bool = False
    complete: bool = True
    changed: dict[bytes, int] = dataclasses.field(default_factory=dict)
    links: dict[bytes, int] = dataclasses.field(default_factory=dict)

    def add(self, record: bytes) -> bool:
        """:returns: whether it was the last one"""
        kind, *rest = record.split(b' ', 5)
        if kind == b'all':
            self.everything = True
            return True
        if kind == b'end':
            self.complete = rest[0] == b'0'
            return True
        inode, links, size, changed, name = rest
        if links != b'1':
            self.links[name] = int(inode)
        if changed == b'1' and kind == b'f':
            self.changed[name] = int(size)
        return False


def _prepare(
    sock: socket.socket, upper: pathlib.Path, final: bool, deadline: float,
    idle_timeout: float,
) -> list[str]:
    """Read the preamble and do what it says.

    :returns: more options for rsync
    """
    with os.scandir(upper) as entries:
        empty = next(entries, None) is None
    preamble = _read_preamble(sock, deadline, idle_timeout)
    if empty:
        return []
    if preamble.everything or not preamble.complete:
        if final and not preamble.everything:
            raise errors.ContainerError(
                'internal', 'the source cannot list its files',
                remedy='See the log of pycontainer-agent on the source')
        return ['--ignore-times']
    root = os.open(upper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync_links.separate(root, upper, preamble.links)
        for name, size in preamble.changed.items():
            _spoil(root, name, size)
    finally:
        os.close(root)
    return []


def _spoil(root: int, name: bytes, size: int) -> None:
    """Make rsync look into a file, whose size and time may be the same.

    What is beyond the size it is to have goes at once: its space may be
    needed by another file.
    """
    try:
        fd = syscalls.openat2(
            root, os.fsdecode(name), os.O_WRONLY | os.O_NONBLOCK,
            syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS |
            syscalls.RESOLVE_NO_XDEV)
    except OSError as e:
        if e.errno in _NOT_A_FILE:
            return
        raise
    try:
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode):
            if info.st_size > size:
                os.ftruncate(fd, size)
            os.utime(fd, ns=(info.st_atime_ns, secrets.randbelow(1 << 60)))
    finally:
        os.close(fd)


def _read_preamble(
    sock: socket.socket, deadline: float, idle_timeout: float
) -> _Preamble:
    """Read up to the end of the preamble, and no byte of what follows."""
    preamble = _Preamble()
    carry = b''
    total = 0
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        patience = min(idle_timeout, deadline - time.monotonic())
        if not poll.poll(max(patience, 0) * 1000):
            raise _timeout('the list of changed files', idle_timeout)
        # What follows is for rsync, so look first, then take.
        chunk = sock.recv(_CHUNK, socket.MSG_PEEK)
        total += len(chunk)
        if not chunk or total > _MAX_PREAMBLE:
            raise errors.ContainerError(
                'network', 'the copy of the files was cut off',
                cause='the source went away' if not chunk else
                'its list of changed files is too long',
                remedy='See the log of pycontainer-agent on the source')
        start = 0
        last = False
        while not last and (end := chunk.find(0, start)) >= 0:
            try:
                last = preamble.add(carry + chunk[start:end])
            except (ValueError, IndexError) as e:
                raise errors.ContainerError(
                    'network', 'the list of changed files is damaged',
                    cause=str(e)) from e
            carry = b''
            start = end + 1
        if not last:
            carry += chunk[start:]
            start = len(chunk)
        while start:
            start -= len(sock.recv(start))
        if last:
            return preamble


def _timeout(what: str, seconds: float) -> errors.ContainerError:
    return errors.ContainerError(
        'timeout', f'{what} did not end within {seconds:.0f} s',
        remedy='Look at the load of both hosts and of the network between '
               'them')


def _judge(code: int, complaint: str, final: bool) -> None:
    """Raise what an exit code of rsync means; see rsync(1), EXIT VALUES."""
    if code == 0:
        return
    text = complaint.strip()
    cause = '; '.join(text.splitlines()[:5])[:1000] or f'exit code {code}'
    if 'No space left on device' in text or 'Disk quota exceeded' in text:
        raise errors.ContainerError(
            'no_space', 'the files do not fit on the destination',
            cause=cause, remedy='Free space there, or choose another host')
    if code in (23, 24) and not final:
        # The guest changed what was being read. What is wrong beyond that
        # fails the last pass.
        LOG.debug('a pass was incomplete: %s', cause)
        return
    if code in (30, 35):
        error = 'timeout', 'the copy of the files came to a halt'
    elif code in (10, 12) or code < 0:
        error = 'network', 'the copy of the files was cut off'
    else:
        error = 'internal', 'the files could not be copied'
    raise errors.ContainerError(
        *error, cause=cause, remedy='See the logs of pycontainer-agent on '
        'both hosts')


def _stats(text: str, complete: bool, seconds: float) -> Stats:
    found = {name: int(number) for name, number in re.findall(
        r'^(.+?): (\d+)', text, re.MULTILINE)}
    try:
        return Stats(
            complete=complete,
            files=found['Number of files'],
            transferred=found['Number of regular files transferred'],
            created=found['Number of created files'],
            deleted=found.get('Number of deleted files', 0),
            total_bytes=found['Total file size'],
            literal_bytes=found['Literal data'],
            received=found['Total bytes received'],
            seconds=seconds)
    except KeyError as e:
        raise errors.ContainerError(
            'internal', 'rsync gave no statistics', cause=f'{e} is missing',
            remedy='Use rsync 3.2 or newer') from None
