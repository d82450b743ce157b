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

"""TLS over one socket, for threads and for loops.

Not ``ssl.SSLSocket``: OpenSSL's objects are not safe for a reader and a
writer at the same time (CPython locks them from 3.13 on only), and its
``unwrap`` cannot close one direction while data still comes in the other.
With OpenSSL between two memory buffers all waiting is ours, outside the lock.
"""

import collections.abc as cabc
import contextlib
import select
import socket
import ssl
import threading
import time
import typing as ty

from nova_pycontainer.runtime import errors

#: Bytes that one system call moves.
CHUNK: ty.Final = 256 << 10
#: Bytes of one TLS record.
_RECORD: ty.Final = 16 << 10


def network_error(message: str, cause: object = None) -> errors.ContainerError:
    return errors.ContainerError(
        'network', message, cause=None if cause is None else str(cause))


def timeout_error(message: str) -> errors.ContainerError:
    return errors.ContainerError('timeout', message)


class Transport:
    """TLS over a connected socket that becomes this object's.

    The methods without a time-out never block; they are for one loop that
    polls :meth:`fileno`. Every method may be called from any thread, and
    raises ContainerError ``network`` when the connection is broken.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *,
                 server: bool) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._lock = threading.Lock()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server)
        #: Small until much arrives: who has not said hello yet gets no more.
        self._received = bytearray(_RECORD)
        #: Decrypted, and not yet asked for.
        self._early = memoryview(b'')
        #: Encrypted, and not yet taken by the kernel.
        self._unsent = memoryview(b'')
        self._eof = False
        self._write_closed = False
        self._closed = False
        self._users = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def wants_write(self) -> bool:
        """There is something that the kernel did not take yet."""
        return bool(self._unsent) or self._outgoing.pending > 0

    @property
    def closed(self) -> bool:
        return self._closed

    def peer_certificate(self) -> bytes | None:
        """DER; None before the handshake."""
        return self._tls.getpeercert(True)

    def version(self) -> str | None:
        return self._tls.version()

    # What never blocks

    @contextlib.contextmanager
    def _locked(self) -> cabc.Iterator[None]:
        with self._lock:
            if self._closed:
                raise network_error('the connection was closed by this side')
            try:
                yield
            except ssl.SSLError as e:
                # What explains it to the other side.
                with contextlib.suppress(OSError):
                    self._flush()
                raise network_error('the encrypted connection failed',
                                    _reason(e)) from e
            except OSError as e:
                raise network_error('the connection is broken', e) from e

    def _fill(self) -> bool:
        """Take from the kernel what has arrived; False if nothing has."""
        if self._eof:
            return False
        try:
            count = self._sock.recv_into(self._received)
        except (BlockingIOError, InterruptedError):
            return False
        if count:
            self._incoming.write(memoryview(self._received)[:count])
            if count == len(self._received) < CHUNK:
                self._received = bytearray(CHUNK)
        else:
            self._eof = True
            self._incoming.write_eof()
        return True

    def _flush(self) -> bool:
        """Give to the kernel what it takes; True if all was taken."""
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            try:
                count = self._sock.send(self._unsent, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return False
            self._unsent = self._unsent[count:]

    def handshake(self) -> bool:
        """Go on with the handshake; True when it is over."""
        with self._locked():
            while True:
                try:
                    self._tls.do_handshake()
                except ssl.SSLWantReadError:
                    self._flush()
                    if not self._fill():
                        return False
                else:
                    self._flush()
                    return True

    def read_into(self, buffer: memoryview) -> int | None:
        """Read what is there; None: nothing; 0: the other side's end.

        An end that the other side did not announce is an error: somebody
        may have cut the connection.
        """
        with self._locked():
            total = min(len(buffer), len(self._early))
            buffer[:total] = self._early[:total]
            self._early = self._early[total:]
            while total < len(buffer):
                try:
                    count = self._tls.read(
                        len(buffer) - total,
                        buffer[total:])
                except ssl.SSLWantReadError:
                    if total or not self._fill():
                        break
                    continue
                except ssl.SSLZeroReturnError:
                    return total
                if not count:
                    return total
                total += ty.cast(int, count)
            # An answer of TLS itself, such as to a change of keys. That the
            # other side takes nothing any more is no reason to lose what it
            # has sent before.
            with contextlib.suppress(OSError):
                self._flush()
            return total or None

    def write(self, data: memoryview) -> int:
        """Encrypt a part and give it to the kernel; 0: wait for it."""
        with self._locked():
            total = 0
            if self._flush():
                end = min(CHUNK, len(data))
                while total < end:
                    total += self._tls.write(data[total:total + _RECORD])
                self._flush()
            return total

    def flush(self) -> bool:
        """True if the kernel has taken all that was written."""
        with self._locked():
            return self._flush()

    def drained(self) -> bool:
        """For a connection that has failed: is the other side gone?

        Meanwhile what is left to send is sent, and what comes thrown away.
        """
        with self._lock:
            if self._closed:
                return True
            try:
                if self._flush():
                    with contextlib.suppress(OSError):
                        self._sock.shutdown(socket.SHUT_WR)
                while self._sock.recv_into(self._received):
                    pass
                return True
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                return True

    def end(self) -> None:
        """Announce the end of what this side sends; it can still read."""
        with self._locked():
            if self._write_closed:
                return
            self._write_closed = True
            # Python calls SSL_shutdown twice: the first announces our end,
            # the second looks for the other side's, and must not find data.
            early = bytearray(self._early)
            with contextlib.suppress(ssl.SSLWantReadError,
                                     ssl.SSLZeroReturnError):
                while data := self._tls.read(_RECORD):
                    early += data
            self._early = memoryview(early)
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.unwrap()
            self._flush()

    # What blocks, for at most so long

    @contextlib.contextmanager
    def using(self) -> cabc.Iterator[None]:
        """:meth:`fileno` stays this connection's, whoever closes it."""
        with self._lock:
            if self._closed:
                raise network_error('the connection was closed by this side')
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._users:
            self._sock.close()

    def wait(self, deadline: float, *, write: bool, what: str) -> None:
        """Wait until there may be progress.

        :param write: in writing, else in reading

        :param deadline: of ``time.monotonic()``
        :raises ContainerError: ``timeout``
        """
        poller = select.poll()
        events = select.POLLOUT if write else select.POLLIN
        if self.wants_write:
            events |= select.POLLOUT
        left = deadline - time.monotonic()
        if left > 0:
            poller.register(self.fileno(), events)
            if poller.poll(left * 1000):
                return
        raise timeout_error(f'{what} took too long')

    def complete_handshake(self, deadline: float) -> None:
        """:raises ContainerError: ``network``, ``timeout``"""
        with self.using():
            while not self.handshake() or not self.flush():
                self.wait(deadline, write=False, what='the TLS handshake')

    def recv_some(self, buffer: memoryview, deadline: float) -> int:
        """Wait for data; 0: the other side's end.

        :raises ContainerError: ``network``, ``timeout``
        """
        with self.using():
            while (count := self.read_into(buffer)) is None:
                self.wait(deadline, write=False, what='waiting for data')
            return count

    def send_all(self, data: memoryview, deadline: float) -> None:
        """Send all; only one thread may be in here.

        :raises ContainerError: ``network``, ``timeout``: a part may have
            been sent, so that the connection is of no use any more
        """
        with self.using():
            while data:
                count = self.write(data)
                data = data[count:]
                if not count:
                    self.wait(deadline, write=True, what='sending')
            while not self.flush():
                self.wait(deadline, write=True, what='sending')

    def abort(self) -> None:
        """Close at once; who waits in another thread is woken."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._close_if_unused()

    def close(self, linger_s: float) -> None:
        """Announce the end, let what was sent arrive, close.

        A socket that is closed with unread data resets the connection, and
        the other side may then lose what it did not read yet. So wait for
        its end, at most ``linger_s`` seconds.
        """
        deadline = time.monotonic() + linger_s
        buffer = memoryview(bytearray(_RECORD))
        try:
            with self.using():
                self.end()
                while not self.flush():
                    self.wait(deadline, write=True, what='closing')
                self._sock.shutdown(socket.SHUT_WR)
                while True:
                    count = self.read_into(buffer)
                    if count == 0:
                        break
                    if count is None:
                        self.wait(deadline, write=False, what='closing')
                    elif time.monotonic() > deadline:
                        break
        except (errors.ContainerError, OSError):
            # Already broken, or the other side does not care.
            pass
        finally:
            self.abort()


def _reason(error: ssl.SSLError) -> str:
    """OpenSSL's reason without the place in its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f'certificate refused: {error.verify_message}'
    if error.reason == 'UNEXPECTED_EOF_WHILE_READING':
        return 'the other side closed it without notice'
    return (error.reason or str(error)).replace('_', ' ').lower()
