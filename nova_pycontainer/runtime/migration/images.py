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

"""CRIU's images in memory, and on their way to the other host.

The pages of a guest are most of the data. They are sent while CRIU still
writes them, and let go once they are sent; the other files are small and are
sent when the dump is whole.
"""

import os
import pathlib
import struct
import threading
import typing as ty

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime import syscalls

#: name's length, offset, data's length.
_HEADER = struct.Struct('!HQI')
#: In the place of a length: that was all; that was not all, and it is worth
#: nothing, because the dump was given up.
_WHOLE = 0xFFFFFFFF
_GIVEN_UP = 0xFFFFFFFE
_CHUNK = 1 << 20
_POLL = 0.002
_TICK = 0.2
_FALLOC_PUNCH = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_NAME_MAX = 255
#: Bytes for a guest whose memory has no limit.
_UNLIMITED = 64 << 30
#: No file is longer (loff_t).
_END = (1 << 63) - 1


#: Seconds without a byte from the other side.
_SILENCE = 120.0
#: Seconds for the last words of a stream.
_STOP_TIMEOUT = 10.0


def _recv_exact(connection: channel.Connection, buffer: memoryview) -> None:
    while buffer:
        count = connection.recv_into(buffer, _SILENCE)
        if not count:
            raise errors.ContainerError(
                'network', 'the stream of images is cut')
        buffer = buffer[count:]


class Memory:
    """A tmpfs of its own: what lies there is in memory only.

    /run is not used: distributions limit it to a part of the memory that a
    guest easily exceeds.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def mount(self, size: int) -> None:
        """:param size: bytes that the images may take at most"""
        # Nobody gets through the directory above. What CRIU restores opens
        # its images from below, and has an id of the guest's by then.
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o755, exist_ok=True)
        if os.path.ismount(self.path):
            return
        try:
            self._mount(size, noswap=True)
        except OSError:
            # tmpfs knows the option since Linux 6.4.
            self._mount(size, noswap=False)

    def _mount(self, size: int, noswap: bool) -> None:
        options: dict[str, str | None] = {'size': str(size), 'mode': '0755'}
        if noswap:
            options['noswap'] = None
        syscalls.mount_tmpfs(
            str(self.path), 'pycontainer-images', options,
            syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV |
            syscalls.MOUNT_ATTR_NOEXEC)

    def unmount(self) -> None:
        """Idempotent."""
        while os.path.ismount(self.path):
            syscalls.umount(str(self.path), syscalls.MNT_DETACH)
        if self.path.exists():
            self.path.rmdir()


def size_of(limits: cgroup.Limits, ahead: bool = False) -> int:
    """How large the images of a guest may get, in bytes.

    :param limits: the guest's
    :param ahead: whether what a page was before may lie there beside it
    """
    limit = (limits.memory_bytes or _UNLIMITED) + limits.swap_bytes
    return limit * (2 if ahead else 1) + limit // 4 + (256 << 20)


class Sender:
    """Sends a directory of images while it is being written."""

    def __init__(
        self, directory: pathlib.Path, stream: channel.Connection,
        limiter: bandwidth.Bandwidth,
    ) -> None:
        self._limiter = limiter
        self._directory = directory
        self._stream = stream
        self._offsets: dict[str, int] = {}
        self._buffer = memoryview(bytearray(_CHUNK))
        self._complete = threading.Event()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self.sent = 0
        self._thread = threading.Thread(
            target=self._run, name='images', daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(
        self, check: ty.Callable[[], None] = lambda: None
    ) -> None:
        """The dump is whole: send the rest, and wait until that is done.

        :param check: called now and then; raises if that is not wanted
        :raises ContainerError: the stream broke
        """
        self._complete.set()
        while self._thread.is_alive():
            self._thread.join(_TICK)
            check()
        if self._error is not None:
            raise errors.ContainerError(
                'network', 'sending the images failed',
                cause=str(self._error)) from self._error

    def stop(self) -> None:
        """Give up, unless all is sent, and tell the receiver."""
        self._stopped.set()
        self._complete.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_TIMEOUT)

    def _run(self) -> None:
        try:
            while not self._complete.is_set():
                if not self._send_some('pages-*.img'):
                    self._complete.wait(_POLL)
            while not self._stopped.is_set() and self._send_some('*'):
                pass
            self._stream.send_bytes(memoryview(_HEADER.pack(
                0, 0, _GIVEN_UP if self._stopped.is_set() else _WHOLE)))
        except BaseException as e:
            self._error = e

    def _send_some(self, pattern: str) -> bool:
        """Send what is new; False: nothing is."""
        progress = False
        for path in sorted(self._directory.glob(pattern)):
            if path.suffix == '.log' or not path.is_file():
                continue
            while self._send_chunk(path):
                progress = True
                if self._stopped.is_set():
                    return False
        return progress

    def _send_chunk(self, path: pathlib.Path) -> bool:
        name = path.name
        known = name in self._offsets
        offset = self._offsets.get(name, 0)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.preadv(fd, [self._buffer], offset)
            if size == 0 and known:
                return False
            encoded = name.encode()
            self._stream.send_bytes(memoryview(
                _HEADER.pack(len(encoded), offset, size) + encoded))
            self._stream.send_bytes(
                self._buffer[:size], limiter=self._limiter)
            self._offsets[name] = offset + size
            self.sent += size
            if size == _CHUNK:
                # Sent is gone: the images never take the guest's size twice.
                _punch(fd, offset, size)
            return size > 0
        finally:
            os.close(fd)


def _punch(fd: int, offset: int, size: int) -> None:
    syscalls.fallocate(fd, _FALLOC_PUNCH, offset, size)


def receive(
    directory: pathlib.Path, stream: channel.Connection,
    progress: ty.Callable[[int], None] = lambda size: None,
) -> int | None:
    """Write what a :class:`Sender` sends into ``directory``.

    :returns: bytes of all files; None: the source has given up this dump
    :raises ContainerError: ``invalid``, ``no_space``
    """
    header = memoryview(bytearray(_HEADER.size))
    name_buffer = memoryview(bytearray(_NAME_MAX))
    buffer = memoryview(bytearray(_CHUNK))
    files: dict[str, int] = {}
    total = 0
    try:
        while True:
            _recv_exact(stream, header)
            length, offset, size = _HEADER.unpack(header)
            if size == _WHOLE:
                return total
            if size == _GIVEN_UP:
                return None
            if not 0 < length <= _NAME_MAX or size > _CHUNK or (
                    offset + size > _END):
                raise errors.ContainerError(
                    'invalid', 'the stream of images is damaged')
            _recv_exact(stream, name_buffer[:length])
            name = bytes(name_buffer[:length]).decode('ascii', 'replace')
            if '/' in name or name.startswith('.') or '\0' in name:
                raise errors.ContainerError(
                    'invalid', f'{name!r} is not the name of an image')
            _recv_exact(stream, buffer[:size])
            if name not in files:
                files[name] = os.open(
                    directory / name,
                    os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW |
                    os.O_CLOEXEC, 0o644)
            done = 0
            while done < size:
                done += os.pwrite(
                    files[name], buffer[done:size], offset + done)
            total += size
            progress(total)
    except OSError as e:
        code = 'no_space' if e.errno in (28, 12) else 'internal'
        raise errors.ContainerError(
            code, 'receiving the images failed', cause=str(e)) from e
    finally:
        for fd in files.values():
            os.close(fd)


class Receiver:
    """The images of a dump, which may be tried several times.

    :param directory: for them
    :param progress: told how many bytes have come
    :param failed: told why there will be none
    """

    def __init__(
        self, directory: pathlib.Path, progress: ty.Callable[[int], None],
        failed: ty.Callable[[errors.ContainerError], None],
    ) -> None:
        self._directory = directory
        self._progress, self._failed = progress, failed
        self._error: BaseException | None = None
        self._done = threading.Event()
        #: One stream at a time.
        self._receiving = threading.Lock()
        self._lock = threading.Lock()
        self._streams: list[channel.Connection] | None = []

    def receive(self, stream: channel.Connection) -> None:
        """Receive them all, or what there is of a dump that is given up."""
        with self._lock:
            if self._streams is None:
                stream.abort()
                return
            self._streams.append(stream)
        # The stream before has ended for the source, and maybe not yet here.
        with stream, self._receiving:
            if not stream.closed:
                self._receive(stream)

    def _receive(self, stream: channel.Connection) -> None:
        self._done.clear()
        try:
            # A dump that was tried again begins anew.
            for path in self._directory.glob('*'):
                if not path.is_dir():
                    path.unlink()
            with room.needed('the pages of the guest\'s memory'):
                if receive(
                        self._directory, stream, self._progress) is None:
                    return
        except BaseException as e:
            self._error = e
            if isinstance(e, errors.ContainerError):
                self._failed(e)
        # Before the stream is closed, which takes a second.
        self._done.set()

    def wait(self, timeout: float) -> None:
        """Wait until all are there.

        :raises ContainerError: why they are not
        """
        if not self._done.wait(timeout):
            raise errors.ContainerError('timeout', 'the images did not come')
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Write nothing from now on: the directory is about to go, and what
        comes later would be in the one below.
        """
        with self._lock:
            streams, self._streams = self._streams, None
        for stream in streams or ():
            stream.abort()
        with self._receiving:
            pass
