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

"""Consoles in the keeper: one pty master, its log, and who looks at it.

The guest's console must be read for ever, or a guest that prints enough
blocks. Nothing that a reader does or fails to do may delay that.
"""

import collections
import errno
import fcntl
import os
import socket
import struct
import termios
import typing as ty

#: Bytes taken per read; also the most that one console gets per turn.
CHUNK: ty.Final = 65536

#: Output kept for a viewer that is slower than the guest. Older output is
#: dropped first: a viewer wants to see the end.
VIEWER_BACKLOG: ty.Final = 262144

#: Input kept for a guest that does not read its console. Beyond it the
#: writer is not read from, so that its own peer notices.
INPUT_BACKLOG: ty.Final = 65536

#: Seconds between two looks at a console that nothing has open, the first
#: and the longest.
RETRY_FIRST: ty.Final = 0.01
RETRY_MAX: ty.Final = 0.5


#: asm-generic/ioctls.h; Python has it from 3.13 on.
_TIOCGPTPEER: ty.Final = 0x5441


def disown(master: int) -> None:
    """Make a pty the controlling terminal of no session.

    An OCI runtime makes the console the controlling terminal of the
    container's init. No kernel does that with a machine's console: there a
    login takes it, which now fails ("TIOCSCTTY: Operation not permitted"),
    and the interrupt key sends SIGINT to the init, which for most means a
    reboot. Root may take a terminal away from a session, and a session that
    gives it up leaves it to nobody. The keeper leads a session of its own in
    which nothing else runs, and ignores the SIGHUP that comes with it.

    :raises OSError: the caller leads no session, or has a terminal already
    """
    slave = fcntl.ioctl(master, _TIOCGPTPEER,
                        os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        steal = 1
        fcntl.ioctl(slave, termios.TIOCSCTTY, steal)
        fcntl.ioctl(slave, termios.TIOCNOTTY)
    finally:
        os.close(slave)


class LogRing:
    """Two files, ``path`` and ``path``.1, that never exceed ``max_bytes``.

    Each file holds up to half; a full one replaces the older one. Between
    half and all of the limit is therefore always there to read.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        self.path = path
        self._half = max(1, max_bytes // 2)
        self._fd: int | None = None
        self._size = 0
        self.lost = 0

    def open(self) -> None:
        """Open the file now instead of at the first write.

        :raises OSError: the log cannot be written
        """
        self._fd = os.open(
            self.path,
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            | os.O_CLOEXEC,
            0o600)
        self._size = os.fstat(self._fd).st_size
        if self._size > self._half:
            # The limit was lowered since.
            os.ftruncate(self._fd, 0)
            self._size = 0
        try:
            if os.lstat(f'{self.path}.1').st_size > self._half:
                os.unlink(f'{self.path}.1')
        except FileNotFoundError:
            pass

    def _rotate(self) -> None:
        os.replace(self.path, f'{self.path}.1')
        self.close()
        self.open()

    def write(self, data: bytes) -> None:
        """Append; on a full or broken disk, count and drop."""
        # Of a burst that is larger than the ring only the end would stay.
        if len(data) > 2 * self._half:
            data = data[-2 * self._half:]
        view = memoryview(data)
        try:
            while view:
                if self._fd is None:
                    self.open()
                if self._size >= self._half:
                    self._rotate()
                    continue
                fd = ty.cast(int, self._fd)
                written = os.write(fd, view[:self._half - self._size])
                self._size += written
                view = view[written:]
        except OSError:
            self.lost += len(view)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Viewer:
    """One who looks at a console: a connected, non-blocking stream socket."""

    def __init__(self, sock: socket.socket, may_write: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.may_write = may_write
        self.dropped = 0
        self._queue: collections.deque[bytes] = collections.deque()
        self._queued = 0

    def show(self, data: bytes) -> None:
        """Queue output; the oldest goes when the viewer is too slow."""
        self._queue.append(data)
        self._queued += len(data)
        while self._queued > VIEWER_BACKLOG:
            oldest = self._queue.popleft()
            self._queued -= len(oldest)
            self.dropped += len(oldest)

    def flush(self) -> bool:
        """Send what the socket takes; True when nothing is left.

        :raises OSError: the viewer has gone
        """
        while self._queue:
            try:
                sent = self.sock.send(self._queue[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return False
            self._queued -= sent
            if sent == len(self._queue[0]):
                self._queue.popleft()
            else:
                self._queue[0] = self._queue[0][sent:]
        return True

    @property
    def pending(self) -> bool:
        return bool(self._queue)


class Console:
    """The console of one instance; it outlives its pty master.

    A reboot or a migration brings a new master; viewers and log stay.
    """

    def __init__(self, uuid: str, ring: LogRing) -> None:
        self.uuid = uuid
        self.ring = ring
        self.viewers: list[Viewer] = []
        self.master: int | None = None
        #: Which master it is, counted: numbers of descriptors come again.
        self.generation = 0
        self.retry = RETRY_FIRST
        #: Nothing has the other end open, so it is looked at now and then.
        self.idle = False
        self._input = bytearray()

    def use(self, master: int) -> None:
        os.set_blocking(master, False)
        self.master = master
        self.generation += 1
        self.retry = RETRY_FIRST
        self.idle = False
        # What was typed for the former guest is not for this one.
        self._input.clear()

    def read(self) -> bool:
        """Take one chunk of output, if there is one, to log and viewers.

        :returns: False when no process has the console open (EIO)
        """
        assert self.master is not None
        try:
            data = os.read(self.master, CHUNK)
        except BlockingIOError:
            data = b''
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            return False
        self.retry = RETRY_FIRST
        if data:
            self.ring.write(data)
            for viewer in self.viewers:
                viewer.show(data)
        return True

    def writer(self) -> Viewer | None:
        """The one who may type: the latest that asked to, and is there."""
        for viewer in reversed(self.viewers):
            if viewer.may_write:
                return viewer
        return None

    def type(self, viewer: Viewer, data: bytes) -> None:
        if viewer is self.writer():
            self._input += data

    @property
    def input_pending(self) -> bool:
        return bool(self._input)

    @property
    def input_full(self) -> bool:
        return len(self._input) >= INPUT_BACKLOG

    def flush_input(self) -> None:
        """Give the guest what it takes of what was typed."""
        if self.master is None or not self._input:
            return
        try:
            written = os.write(self.master, self._input[:4096])
        except BlockingIOError:
            return
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            written = len(self._input)
        del self._input[:written]

    def resize(self, rows: int, columns: int) -> None:
        """Set the window's size; the guest gets SIGWINCH (tty_ioctl(4))."""
        assert self.master is not None
        fcntl.ioctl(
            self.master, termios.TIOCSWINSZ,
            struct.pack('HHHH', rows, columns, 0, 0))

    def describe(self) -> dict[str, ty.Any]:
        return {
            'log_path': self.ring.path,
            'viewers': len(self.viewers),
            'idle': self.idle,
            'lost': self.ring.lost,
            'dropped': sum(v.dropped for v in self.viewers),
        }
