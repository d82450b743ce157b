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

"""Connections between the agents of two hosts.

One TCP port per host. Each connection is mutual TLS 1.3 and begins with one
frame of the dialling side, which says what it is for (:class:`Hello`); the
other side answers that it is welcome, or why not. Then it belongs to whoever
migrates: frames both ways for control, bytes for the rest.

A frame is its length (4 bytes, big endian) and a JSON object.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import ipaddress
import json
import socket
import ssl
import struct
import threading
import time
import typing as ty

from nova_pycontainer.runtime import config
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import tls
from nova_pycontainer.runtime.migration import versions

#: Of the hello frame.
VERSION: ty.Final = 1
ROLES: ty.Final = frozenset([
    # What there is to know of a container that is down.
    'facts',
    'control', 'upper', 'memory', 'images', 'pages', 'layer'])
Bandwidth = bandwidth.Bandwidth
#: Bytes of a frame.
MAX_FRAME: ty.Final = 1 << 20
#: Bytes of the first frame, and of its answer.
MAX_HELLO: ty.Final = 4 << 10
#: Seconds for the other side to take what is sent.
SEND_TIMEOUT: ty.Final = 60.0
#: Seconds without a byte of what must come.
RECV_TIMEOUT: ty.Final = 300.0

_LENGTH: ty.Final = struct.Struct('>I')
#: Seconds until a host that has vanished is noticed. The data connections
#: have more time: this is also how long the other side may read nothing
#: (tcp(7), TCP_USER_TIMEOUT; net/ipv4/tcp_timer.c), while its disk is slow.
_DEAD_AFTER: ty.Final = 30.0
_DATA_DEAD_AFTER: ty.Final = 120.0


@dataclasses.dataclass(frozen=True)
class Hello:
    """What a connection is for.

    :ivar seq: tells connections of one role apart; never used twice
    """

    migration: str
    instance: str
    role: str
    seq: int = 0

    def to_frame(self) -> dict[str, ty.Any]:
        return {'v': VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_frame(cls, frame: dict[str, ty.Any]) -> 'Hello':
        """:raises ContainerError: ``invalid``, ``unsupported``"""
        if frame.get('v') != VERSION:
            raise _other_version(frame, 'the host that connects')
        try:
            hello = cls(**{k: v for k, v in frame.items() if k != 'v'})
        except TypeError as e:
            raise _invalid(f'the hello has other fields: {_short(frame)}'
                           ) from e
        for value in (hello.migration, hello.instance):
            try:
                config.check_uuid(value)
            except errors.ContainerError as e:
                raise _invalid(f'{_short(value)} is no uuid') from e
        if not isinstance(hello.role, str) or hello.role not in ROLES:
            raise _invalid(f'there is no role {_short(hello.role)}')
        # A bool is an int as well.
        if type(hello.seq) is not int or not 0 <= hello.seq < 1 << 31:
            raise _invalid(f'{_short(hello.seq)} is no sequence number')
        return hello


def _other_version(
    frame: dict[str, ty.Any], them: str
) -> errors.ContainerError:
    # The agents have compared the versions of their whole protocol before;
    # this is for those that were upgraded since.
    reason, remedy = versions.difference(
        frame.get('v'), them, VERSION) or ('', '')
    return errors.ContainerError('unsupported', reason, remedy=remedy)


def _invalid(message: str) -> errors.ContainerError:
    return errors.ContainerError('invalid', message)


def _short(value: object) -> str:
    """What the other side sent, fit for a log."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + '...'


def encode(frame: dict[str, ty.Any], limit: int = MAX_FRAME) -> bytes:
    """:raises ContainerError: ``invalid``: too large"""
    body = json.dumps(frame, separators=(',', ':')).encode('ascii')
    if len(body) > limit:
        raise _invalid(f'a frame of {len(body)} bytes is too large')
    return faults.mangled(_LENGTH.pack(len(body)) + body)


class FrameReader:
    """Puts frames together, and never reads beyond the end of one."""

    def __init__(self, transport: tls.Transport, limit: int) -> None:
        self._transport = transport
        self.limit = limit
        self._start()

    def _start(self) -> None:
        self._body = False
        self._buffer = bytearray(_LENGTH.size)
        self._have = 0

    @property
    def _rest(self) -> memoryview:
        return memoryview(self._buffer)[self._have:]

    def step(self) -> dict[str, ty.Any] | bool | None:
        """Go on, without blocking.

        :returns: a frame; True: call again; False: nothing has arrived;
            None: the other side ended between two frames
        :raises ContainerError: ``network``, ``invalid``
        """
        count = self._transport.read_into(self._rest)
        return False if count is None else self._took(count)

    def read(self, deadline: float) -> dict[str, ty.Any] | None:
        """Wait for a frame; None: the other side ended between two.

        :raises ContainerError: ``network``, ``invalid``, ``timeout``: what
            has arrived of a frame is kept for the next call
        """
        while True:
            result = self._took(
                self._transport.recv_some(self._rest, deadline))
            if result is not True:
                return ty.cast(dict[str, ty.Any] | None, result)

    def _took(self, count: int) -> dict[str, ty.Any] | bool | None:
        if not count:
            if self._have or self._body:
                raise tls.network_error('a frame of the other host is cut')
            return None
        self._have += count
        if self._have < len(self._buffer):
            return True
        if not self._body:
            length, = _LENGTH.unpack(self._buffer)
            if not 2 <= length <= self.limit:
                raise _invalid(
                    f'the other host sends a frame of {length} bytes')
            self._body, self._have = True, 0
            self._buffer = bytearray(length)
            return True
        data = bytes(self._buffer)
        self._start()
        return _decode(data)


def _decode(data: bytes) -> dict[str, ty.Any]:
    try:
        frame = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise _invalid('a frame of the other host is not JSON') from e
    if not isinstance(frame, dict):
        raise _invalid('a frame of the other host is not an object')
    return frame


class Connection:
    """A connection that both sides have agreed on.

    Methods may be called from any thread, one at a time per direction.
    Failures raise ContainerError ``network`` or ``timeout``.

    :ivar fingerprint: of the other host's certificate
    :ivar remote: its address and port
    """

    def __init__(self, transport: tls.Transport, hello: Hello,
                 remote: str) -> None:
        self.transport = transport
        self.hello = hello
        self.remote = remote
        self.fingerprint = keys.fingerprint(
            transport.peer_certificate() or b'')
        self._reader = FrameReader(transport, MAX_FRAME)
        self._sending = threading.Lock()

    def __repr__(self) -> str:
        return (f'<connection {self.hello.role}/{self.hello.seq} of migration'
                f' {self.hello.migration} with {self.remote}>')

    @property
    def closed(self) -> bool:
        return self.transport.closed

    def fileno(self) -> int:
        return self.transport.fileno()

    def send(self, frame: dict[str, ty.Any],
             timeout: float = SEND_TIMEOUT) -> None:
        """Send one frame; frames of several threads do not mix."""
        self.send_bytes(encode(frame), timeout)

    def recv(self, timeout: float) -> dict[str, ty.Any] | None:
        """Wait for a frame; None: the other side has closed in order.

        A time-out loses nothing: the next call goes on.
        """
        return self._reader.read(time.monotonic() + timeout)

    def send_bytes(
        self, data: bytes | bytearray | memoryview,
        timeout: float = SEND_TIMEOUT,
        limiter: bandwidth.Bandwidth | None = None,
    ) -> None:
        """Send bytes.

        :param timeout: seconds in which the other side must take each
            :data:`tls.CHUNK`; waiting for the limiter does not count.
            After a time-out the connection is closed, for a part may have
            been sent
        """
        view = memoryview(data).cast('B')
        with self._turn(timeout):
            for start in range(0, len(view), tls.CHUNK):
                part = view[start:start + tls.CHUNK]
                if limiter is not None:
                    while (delay := limiter.delay()) and not self.closed:
                        time.sleep(min(delay, 0.1))
                    limiter.charge(len(part))
                self.transport.send_all(part, time.monotonic() + timeout)

    @contextlib.contextmanager
    def _turn(self, timeout: float) -> cabc.Iterator[None]:
        if not self._sending.acquire(timeout=timeout):
            raise tls.timeout_error('another thread\'s sending')
        try:
            yield
        except errors.ContainerError as e:
            if e.code == 'timeout':
                self.transport.abort()
            raise
        finally:
            self._sending.release()

    def recv_into(self, buffer: bytearray | memoryview,
                  timeout: float) -> int:
        """Wait for bytes, at most as many as fit; 0: the other side's end.
        """
        return self.transport.recv_some(
            memoryview(buffer).cast('B'), time.monotonic() + timeout)

    def recv_exact(self, buffer: bytearray | memoryview,
                   timeout: float = RECV_TIMEOUT) -> None:
        """Fill the buffer.

        :param timeout: seconds without a byte
        """
        view = memoryview(buffer).cast('B')
        while view:
            count = self.recv_into(view, timeout)
            if not count:
                raise tls.network_error(
                    'the other host has ended before all was sent')
            view = view[count:]

    def end(self, timeout: float = SEND_TIMEOUT) -> None:
        """Announce that nothing more will be sent; receiving goes on."""
        with self._turn(timeout):
            self.transport.end()
            self.transport.send_all(
                memoryview(b''), time.monotonic() + timeout)

    def close(self, linger_s: float = 1.0) -> None:
        """Close in order: what was sent arrives. Idempotent.

        :param linger_s: seconds to wait for the other side to close as well
        """
        self.transport.close(linger_s)

    def abort(self) -> None:
        """Close at once, also under other threads' hands. Idempotent."""
        self.transport.abort()

    def __enter__(self) -> 'Connection':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def tune(sock: socket.socket, role: str = 'control') -> None:
    """Notice a host that vanished, and send frames at once."""
    dead = _DEAD_AFTER if role == 'control' else _DATA_DEAD_AFTER
    tcp = socket.IPPROTO_TCP
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(tcp, socket.TCP_NODELAY, 1)
    sock.setsockopt(tcp, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(tcp, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(tcp, socket.TCP_KEEPCNT, max(1, int(dead - 10) // 5))
    sock.setsockopt(tcp, socket.TCP_USER_TIMEOUT, int(dead * 1000))


def where(address: ty.Any) -> str:
    """A socket's address for people."""
    host, port = address[:2]
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host)
        if isinstance(ip, ipaddress.IPv6Address):
            host = str(ip.ipv4_mapped or f'[{ip}]')
    return f'{host}:{port}'


def connect(
    address: str, port: int, identity: keys.Identity, peer: keys.Peer,
    hello: Hello, timeout: float,
) -> Connection:
    """Dial the other host, and be accepted for what ``hello`` says.

    :param address: better an address: looking up a name may take longer
        than ``timeout``
    :param timeout: seconds for all of it
    :raises ContainerError: ``network``; ``timeout``; ``forbidden``: one of
        the two is not who the other expects; ``unsupported``: another
        version; what else the other host refuses with
    """
    deadline = time.monotonic() + timeout
    target = f'{address}:{port}'
    context = identity.context([peer], server=False)
    try:
        sock = socket.create_connection((address, port), timeout)
    except TimeoutError as e:
        raise tls.timeout_error(f'connecting to {target} took too long'
                                ) from e
    except OSError as e:
        raise tls.network_error(f'cannot connect to {target}', e) from e
    try:
        tune(sock, hello.role)
        remote = where(sock.getpeername())
        transport = tls.Transport(sock, context, server=False)
    except OSError as e:
        sock.close()
        raise tls.network_error(f'the connection to {target} broke', e) from e
    try:
        _introduce(transport, identity, peer, hello, deadline)
    except errors.ContainerError as e:
        transport.abort()
        raise _explained(e, target) from e
    except BaseException:
        transport.abort()
        raise
    return Connection(transport, hello, remote)


def _introduce(
    transport: tls.Transport, identity: keys.Identity, peer: keys.Peer,
    hello: Hello, deadline: float,
) -> None:
    transport.complete_handshake(deadline)
    wrong = identity.check(transport.peer_certificate(), peer)
    if wrong is not None:
        raise errors.ContainerError(
            'forbidden', 'it is not the host that was announced',
            cause=wrong)
    reader = FrameReader(transport, MAX_HELLO)
    try:
        transport.send_all(
            memoryview(encode(hello.to_frame(), MAX_HELLO)), deadline)
    except errors.ContainerError:
        # In TLS 1.3 a refusal of our certificate comes after our handshake
        # is over. If there is one, it says more than a broken pipe.
        reader.read(deadline)
        raise
    answer = reader.read(deadline)
    if answer is None:
        raise tls.network_error('the other host has hung up')
    if answer.get('v') != VERSION:
        raise _other_version(answer, 'the host that accepts')
    if answer.get('ok') is not True:
        error = answer.get('error')
        raise errors.ContainerError.from_dict(
            error if isinstance(error, dict) else {})
    # On these this side speaks first.
    if hello.role not in ('control', 'facts') and reader.step() is not False:
        raise _invalid('the other host says more than it was asked')


#: How OpenSSL says that the other side does not take our certificate.
_NOT_ACCEPTED: ty.Final = ('unknown ca', 'bad certificate',
                           'certificate required', 'certificate expired',
                           'certificate unknown', 'access denied')


def _explained(error: errors.ContainerError,
               target: str) -> errors.ContainerError:
    """The error with the host that it is about."""
    cause = error.cause or ''
    code, remedy = error.code, error.remedy
    message = f'{target}: {error.message}'
    if isinstance(error.__cause__, ssl.SSLError):
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            code = 'forbidden'
            message = f'{target} is not the host that was announced'
        elif any(word in cause for word in _NOT_ACCEPTED):
            code = 'forbidden'
            message = f'{target} does not accept this host\'s certificate'
        if 'valid' in cause or 'expired' in cause:
            remedy = 'Compare the clocks of both hosts'
        elif code == 'forbidden':
            remedy = ('Was a key renewed meanwhile? Try again when both '
                      'hosts have updated their records')
    return errors.ContainerError(
        code, message, uuid=error.uuid, step=error.step,
        cause=error.cause, remedy=remedy)
