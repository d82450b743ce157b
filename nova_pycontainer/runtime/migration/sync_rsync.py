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

"""The program rsync: its processes, and what they say."""

import dataclasses
import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import threading
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import process

LOG = logging.getLogger(__name__)

RSYNC = 'rsync'
#: It knows all of our options.
_OLDEST = 3, 2
#: --inplace with --sparse leaves old data where zeros belong before that, and
#: says nothing.
SAFE_INPLACE = 3, 3
#: Exit codes: some files could not be read, or vanished.
INCOMPLETE = (23, 24)
#: The server's, when a file with several names vanishes late: the client asks
#: for it by another name after it has said that there is nothing more.
PROTOCOL = 2
#: The connection was closed.
_CUT = 12
_FULL = ('No space left on device', 'Disk quota exceeded')
#: The I/O priority follows it.
_NICE = ('nice', '-n', '10')
_TIED = ('setpriv', '--pdeathsig', 'KILL')
_KILL_TIMEOUT = 10.0
_OUTPUT_TAIL = 32 << 10


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one pass did. Sizes are bytes.

    :param complete: every file was copied as it was; otherwise some changed
        or vanished meanwhile, or the connection was lost, and another pass is
        needed. The other figures may be 0 then
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


class Process:
    """A child and its children, in a session of their own."""

    def __init__(
        self, argv: ty.Sequence[str], sock: socket.socket, *,
        cwd: pathlib.Path, talks: bool, nice: bool,
        env: dict[str, str] | None = None, tied: bool = False,
    ) -> None:
        """
        :param sock: becomes its stdin, and stdout too if it ``talks``
        :param nice: the guest, and others, come first
        :param tied: it dies with the thread that makes it. For a pass that
            does not leave this host: no connection of ours breaks when this
            process ends
        """
        if tied:
            argv = [*_TIED, *argv]
        # Files, not pipes: nobody has to read along, whatever is said.
        self._out = tempfile.TemporaryFile()
        self._err = tempfile.TemporaryFile()
        try:
            self._child: subprocess.Popen[bytes] = subprocess.Popen(
                [*_NICE, *argv] if nice else argv, stdin=sock.fileno(),
                stdout=(sock if talks else self._out).fileno(),
                stderr=self._err.fileno(), cwd=cwd, start_new_session=True,
                env={'PATH': os.environ.get('PATH', os.defpath),
                     'LC_ALL': 'C', **(env or {})})
        except BaseException:
            self._out.close()
            self._err.close()
            raise
        self._lock = threading.Lock()
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(self._child.pid)
        except OSError:
            self.close()
            raise

    def wait(self, timeout: float) -> bool:
        """Whether it has ended, after ``timeout`` seconds at most."""
        return self._child.returncode is not None or process.exited(
            self._pidfd, max(timeout, 0.0))

    def kill(self) -> int:
        """End it and all of its children. Idempotent.

        :returns: the exit code, negative for a signal
        :raises ContainerError: ``timeout``: the kernel does not let it go
        """
        with self._lock:
            if self._child.returncode is None:
                # Not reaped yet, so the number of its group is still its own.
                os.killpg(self._child.pid, signal.SIGKILL)
            try:
                return self._child.wait(_KILL_TIMEOUT)
            except subprocess.TimeoutExpired:
                raise errors.ContainerError(
                    'timeout', f'rsync (pid {self._child.pid}) does not die',
                    remedy='Look at the disk of this host') from None

    def output(self) -> str:
        """The end of what it said on stdout."""
        return _tail(self._out)

    def complaint(self) -> str:
        """The end of what it said on stderr."""
        return _tail(self._err)

    @property
    def closed(self) -> bool:
        return self._pidfd < 0

    def close(self) -> None:
        try:
            self.kill()
        except errors.ContainerError as e:
            LOG.error('%s', e)
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


@functools.cache
def version() -> tuple[int, int]:
    """The version of this host's rsync.

    :raises ContainerError: ``unsupported``: there is none, or an old one
    """
    try:
        done = subprocess.run(
            [RSYNC, '--version'], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=True, timeout=_KILL_TIMEOUT)
        match = re.match(r'rsync +version v?(\d+)\.(\d+)', done.stdout)
        if match is None:
            raise ValueError(done.stdout[:100])
        found = int(match[1]), int(match[2])
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        raise errors.ContainerError(
            'unsupported', 'rsync cannot be run', cause=str(e),
            remedy='Install rsync') from e
    if found < _OLDEST:
        raise errors.ContainerError(
            'unsupported', f'{match[0]} is too old',
            remedy=f'Install rsync {_OLDEST[0]}.{_OLDEST[1]} or newer')
    return found


def summary(text: str) -> str:
    """The first lines in one. rsync escapes what is odd in names."""
    return '; '.join(text.strip().splitlines()[:5])[:1000]


def judge(code: int, complaint: str, final: bool) -> None:
    """Raise what an exit code of rsync means; see rsync(1), EXIT VALUES."""
    if code == 0:
        return
    cause = summary(complaint) or f'exit code {code}'
    if any(text in complaint for text in _FULL):
        raise errors.ContainerError(
            'no_space', 'the files do not fit on the destination',
            cause=cause, remedy='Free space there, or choose another host')
    if not final and (code in INCOMPLETE or (
            code == _CUT and '[generator]' in complaint)):
        # The guest changed what was being read, or the server has met its
        # own bug (see PROTOCOL). What is wrong beyond that fails the last
        # pass.
        LOG.info('a pass over the files was incomplete: %s', cause)
        return
    if code in (126, 127):
        raise errors.ContainerError(
            'unsupported', 'rsync cannot be run', cause=cause,
            remedy='Install rsync on both hosts')
    if code in (30, 35):
        error = 'timeout', 'the copy of the files came to a halt'
    elif code in (10, _CUT):
        error = 'network', 'the copy of the files was cut off'
    else:
        error = 'internal', 'the files could not be copied'
    raise errors.ContainerError(
        *error, cause=cause, remedy='See the logs of pycontainer-agent on '
        'both hosts')


def stats(text: str, code: int, seconds: float) -> Stats:
    found = {name: int(number) for name, number in re.findall(
        r'^(.+?): (\d+)', text, re.MULTILINE)}
    try:
        return Stats(
            complete=code == 0,
            files=found['Number of files'],
            transferred=found['Number of regular files transferred'],
            created=found['Number of created files'],
            deleted=found['Number of deleted files'],
            total_bytes=found['Total file size'],
            literal_bytes=found['Literal data'],
            received=found['Total bytes received'],
            seconds=seconds)
    except KeyError as e:
        if code:
            # It did not get so far.
            return Stats(False, 0, 0, 0, 0, 0, 0, 0, seconds)
        raise errors.ContainerError(
            'internal', 'rsync gave no statistics', cause=f'{e} is missing',
            remedy='Use rsync 3.2 or newer') from None
