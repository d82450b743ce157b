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

"""Carries a plain socket's bytes over a connection.

Programs such as rsync and CRIU are handed one end of a socket pair; the other
end is here. One thread serves both directions.
"""

import collections.abc as cabc
import contextlib
import os
import select
import socket
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import tls

LOG = logging.getLogger(__name__)

#: Seconds without a byte in either direction: then something is stuck.
IDLE_TIMEOUT: ty.Final = 300.0
#: Seconds for the thread to see that it is to end.
_ABORT_TIMEOUT: ty.Final = 5.0


class Stats:
    """What relays have carried; one object may serve many of them.

    :param carried: called with the bytes of each piece
    """

    def __init__(
        self, carried: cabc.Callable[[int], None] = lambda count: None
    ) -> None:
        self._lock = threading.Lock()
        self._carried = carried
        self.sent = 0
        self.received = 0

    def add(self, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.received += received
            self._carried(sent + received)

    @property
    def bytes(self) -> int:
        """Both directions, without what TLS adds."""
        return self.sent + self.received


class _Buffer:
    """What was read and not written yet."""

    def __init__(self) -> None:
        self._data = memoryview(bytearray(tls.CHUNK))
        self._rest = self._data[:0]
        #: The end was read; passed on.
        self.eof = False
        self.done = False

    def __bool__(self) -> bool:
        return bool(self._rest)

    def fill(self, read: cabc.Callable[[memoryview], int | None]
             ) -> int | None:
        count = read(self._data)
        if count is not None:
            self._rest = self._data[:count]
            self.eof = count == 0
        return count

    def drain(self, write: cabc.Callable[[memoryview], int]) -> int:
        count = write(self._rest)
        self._rest = self._rest[count:]
        return count

    def drop(self) -> None:
        self._rest = self._data[:0]

    def close(self) -> None:
        self._data = self._rest = memoryview(b'')


class Relay:
    """One connection and one socket, both this object's from now on.

    It ends when both directions have, or at the first error. An end in one
    direction is passed on, and the other one stays open.

    :param limiter: for what is sent to the other host
    :param idle_s: seconds without a byte after which it fails
    """

    def __init__(
        self, connection: channel.Connection, plain: socket.socket,
        limiter: bandwidth.Bandwidth | None = None,
        stats: Stats | None = None, *,
        idle_s: float = IDLE_TIMEOUT,
    ) -> None:
        plain.setblocking(False)
        self._connection = connection
        self._tls = connection.transport
        self._plain = plain
        self._limiter = limiter or bandwidth.Bandwidth()
        self.stats = stats or Stats()
        self._idle_s = idle_s
        self._out = _Buffer()
        self._in = _Buffer()
        #: The program reads no more.
        self._deaf = False
        self._aborted = False
        self._abort = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        #: Why it ended early; None: it did not.
        self.error: errors.ContainerError | None = None
        self._thread = threading.Thread(
            target=self._run,
            name=f'relay-{connection.hello.role}-{connection.hello.seq}',
            daemon=True)

    def start(self) -> 'Relay':
        """:raises RuntimeError: there are too many threads"""
        try:
            self._thread.start()
        except RuntimeError:
            self._release(graceful=False)
            raise
        return self

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def abort(self) -> None:
        """End it at once; both sides see that it was cut. Idempotent.

        When this returns nothing is carried any more, and both ends are
        closed.
        """
        with self._lock:
            if self._ended.is_set():
                return
            self._aborted = True
            os.eventfd_write(self._abort, 1)
        if self._thread.ident is None:
            self._release(graceful=False)
        elif self._thread is not threading.current_thread():
            self._ended.wait(_ABORT_TIMEOUT)

    def wait(self, timeout: float) -> bool:
        """Wait for the end; False: not in time. See :attr:`error`."""
        return self._ended.wait(timeout)

    def result(self, timeout: float) -> Stats:
        """Wait for the end.

        :raises ContainerError: ``timeout``: it goes on; else why it failed
        """
        if not self.wait(timeout):
            raise tls.timeout_error('carrying data to the other host')
        if self.error is not None:
            raise self.error
        return self.stats

    # The thread

    def _run(self) -> None:
        graceful = False
        try:
            with self._tls.using():
                self._loop()
            graceful = True
        except errors.ContainerError as e:
            self.error = self.error or e.bare()
        except Exception as e:
            if self._plain.fileno() < 0:
                self.error = _aborted()
                return
            LOG.exception('The relay for %r failed', self._connection)
            self.error = errors.ContainerError(
                'internal', 'carrying data to the other host failed',
                cause=f'{type(e).__name__}: {e}')
        finally:
            self._release(graceful)

    def _release(self, graceful: bool) -> None:
        # The program first: it need not wait for the other host.
        self._plain.close()
        # Whoever asks for the figures keeps this object.
        self._out.close()
        self._in.close()
        if graceful:
            self._connection.close()
        else:
            self._connection.abort()
        with self._lock:
            if not self._ended.is_set():
                self._ended.set()
                os.close(self._abort)

    def _loop(self) -> None:
        moved_at = time.monotonic()
        # Looked at also while all pipes keep flowing, and nobody polls.
        while not self._aborted:
            delay = self._limiter.delay()
            moved = self._send(delay) + self._receive()
            if self._out.done and (self._in.done or self._deaf):
                return
            now = time.monotonic()
            if moved:
                moved_at = now
                continue
            left = moved_at + self._idle_s - now
            if left <= 0:
                raise tls.timeout_error(
                    f'nothing was carried for {self._idle_s:.0f} s')
            self._poll(delay or left, delay > 0)
            if delay:
                # A limiter that lets nobody send is not idleness.
                moved_at = time.monotonic()
        raise _aborted()

    def _send(self, delay: float) -> int:
        """From the program to the other host; how much was done."""
        buffer, moved = self._out, 0
        if not buffer and not buffer.eof and not delay:
            count = buffer.fill(self._read_plain)
            moved += count is not None
        if buffer:
            count = buffer.drain(self._tls.write)
            self._limiter.charge(count)
            self.stats.add(sent=count)
            moved += count
        elif buffer.eof and not buffer.done:
            self._tls.end()
            # The other host has it as soon as the kernel does.
            buffer.done = self._tls.flush()
            moved += buffer.done
        return moved

    def _receive(self) -> int:
        """From the other host to the program; how much was done."""
        buffer, moved = self._in, 0
        if not buffer and not buffer.eof:
            count = buffer.fill(self._tls.read_into)
            moved += count is not None
            self.stats.add(received=count or 0)
        if self._deaf:
            buffer.drop()
        if buffer:
            moved += buffer.drain(self._write_plain)
        elif buffer.eof and not buffer.done:
            with contextlib.suppress(OSError):
                self._plain.shutdown(socket.SHUT_WR)
            buffer.done = True
            moved += 1
        return moved

    def _read_plain(self, view: memoryview) -> int | None:
        try:
            return self._plain.recv_into(view)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as e:
            # It has ended without reading all: what it had sent before has
            # been carried, and its end is passed on.
            self._left(e)
            return 0

    def _write_plain(self, view: memoryview) -> int:
        try:
            return self._plain.send(view, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as e:
            # What it sent before its end still has to reach the other host.
            self._left(e)
            return len(view)

    def _left(self, cause: OSError) -> None:
        if self._plain.fileno() < 0:
            raise _aborted()
        self._deaf = True
        self.error = self.error or tls.network_error(
            'the program at this end of a connection has left while the '
            'other host was sending', cause)

    def _poll(self, timeout: float, limited: bool) -> None:
        """Wait until there can be progress, or it is to be aborted."""
        poller = select.poll()
        poller.register(self._abort, select.POLLIN)
        # Without interest it must not be in the set: an end is always
        # reported, and would make this a busy loop.
        events = 0
        if not self._out and not self._out.eof and not limited:
            events |= select.POLLIN
        if self._in:
            events |= select.POLLOUT
        if events:
            poller.register(self._plain, events)
        events = 0
        if not self._in and not self._in.eof:
            events |= select.POLLIN
        # Not only what TLS has left over: reading sends that as well, and
        # may just have done so.
        if (self._out or (self._out.eof and not self._out.done)
                or self._tls.wants_write):
            events |= select.POLLOUT
        if events:
            poller.register(self._tls.fileno(), events)
        poller.poll(max(1.0, timeout * 1000))


def _aborted() -> errors.ContainerError:
    return errors.ContainerError(
        'aborted', 'carrying data to the other host was aborted')


def relay(
    connection: channel.Connection, plain: socket.socket,
    limiter: bandwidth.Bandwidth | None = None, stats: Stats | None = None, *,
    idle_s: float = IDLE_TIMEOUT,
) -> Relay:
    """Start carrying; see :class:`Relay`."""
    return Relay(connection, plain, limiter=limiter, stats=stats,
                 idle_s=idle_s).start()
