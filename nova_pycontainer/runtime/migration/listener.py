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

"""The port on which a host awaits the other hosts' connections.

One thread and no more: a peer that is slow or silent costs a descriptor until
its time is over, and keeps nobody else waiting.
"""

import collections
import collections.abc as cabc
import dataclasses
import os
import selectors
import socket
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import tls

LOG = logging.getLogger(__name__)

#: Seconds from the connection's beginning until its hello was accepted.
HELLO_TIMEOUT: ty.Final = 10.0
#: Connections that are not accepted yet, at a time, and from one address.
MAX_STRANGERS: ty.Final = 256
MAX_STRANGERS_PER_ADDRESS: ty.Final = 64
#: Connections of one migration, over all of its time.
MAX_CONNECTIONS: ty.Final = 4096
#: Seconds that a refused one has to read why.
_DRAIN: ty.Final = 2.0
#: Refusals that are logged one by one in so many seconds.
_LOGGED: ty.Final = 50
_LOG_PERIOD: ty.Final = 60.0


@dataclasses.dataclass
class _Expectation:
    instance: str
    peer: keys.Peer
    roles: frozenset[str]
    expires: float
    used: set[tuple[str, int]] = dataclasses.field(default_factory=set)


class _Stranger:
    """A connection that has not said yet what it is for."""

    def __init__(self, transport: tls.Transport, sock: socket.socket,
                 host: str, remote: str, timeout: float) -> None:
        self.transport = transport
        #: Still ours in so far as the options are concerned.
        self.sock = sock
        self.host = host
        self.remote = remote
        self.deadline = time.monotonic() + timeout
        self.reader = channel.FrameReader(transport, channel.MAX_HELLO)
        self.shaken = False
        #: Accepted, and the answer is not sent yet.
        self.hello: channel.Hello | None = None
        #: Refused, and the answer is not sent yet.
        self.refused = False


class Listener:
    """Accepts the connections that are expected, and no others.

    :param address: to bind to; ``::`` is all addresses of both kinds
    :param port_range: first and last port; the first free one is taken.
        (0, 0): one of the kernel's choice
    :param on_connection: called in a new thread for each accepted
        connection, which from then on is the callee's to close
    :raises ContainerError: ``network``: no port is free
    """

    def __init__(
        self, address: str, port_range: tuple[int, int],
        identity: keys.Identity,
        on_connection: cabc.Callable[[channel.Connection], None], *,
        hello_timeout: float = HELLO_TIMEOUT,
    ) -> None:
        self._on_connection = on_connection
        self._hello_timeout = hello_timeout
        self._lock = threading.Lock()
        self._identity = identity
        self._expected: dict[str, _Expectation] = {}
        self._update()
        self._strangers: set[_Stranger] = set()
        self._per_host: collections.Counter[str] = collections.Counter()
        self._refusals = 0
        self._refusals_since = 0.0
        self._closing = False
        self._socket = _bind(address, port_range)
        self.address, self.port = self._socket.getsockname()[:2]
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(
            target=self._run, name='channel-listener', daemon=True)
        self._thread.start()

    # Who may come

    def expect(
        self, migration: str, instance: str, peer: keys.Peer,
        roles: cabc.Iterable[str], expires_s: float,
    ) -> None:
        """Accept connections of one migration.

        :param peer: the only host that they may come from
        :param roles: what they may be for
        :param expires_s: seconds from now; see :meth:`extend`
        :raises ContainerError: ``exists``; ``invalid``
        """
        names = frozenset(roles)
        if not names <= channel.ROLES:
            raise errors.ContainerError(
                'invalid', f'unknown roles {sorted(names - channel.ROLES)}')
        peer.pin()
        with self._lock:
            self._forget_expired()
            if migration in self._expected:
                raise errors.ContainerError(
                    'exists', f'migration {migration} is expected already',
                    uuid=instance)
            self._expected[migration] = _Expectation(
                instance, peer, names, time.monotonic() + expires_s)
            self._update()

    def extend(self, migration: str, expires_s: float) -> None:
        """Accept its connections until ``expires_s`` seconds from now.

        :raises ContainerError: ``not_found``: it is not expected any more
        """
        with self._lock:
            self._forget_expired()
            if migration not in self._expected:
                raise errors.ContainerError(
                    'not_found', f'migration {migration} is not expected')
            self._expected[migration].expires = time.monotonic() + expires_s

    def restrict(
        self, migration: str, roles: cabc.Iterable[str]
    ) -> None:
        """From now on accept its connections for these roles only."""
        with self._lock:
            expected = self._expected.get(migration)
            if expected is not None:
                expected.roles = frozenset(roles)

    def forget(self, migration: str) -> None:
        """Accept no more of its connections. Idempotent."""
        with self._lock:
            if self._expected.pop(migration, None) is not None:
                self._update()

    def set_identity(self, identity: keys.Identity) -> None:
        """Use another key for the connections that come from now on."""
        with self._lock:
            self._identity = identity
            self._update()

    def _forget_expired(self) -> None:
        now = time.monotonic()
        expired = [m for m, e in self._expected.items() if e.expires <= now]
        for migration in expired:
            del self._expected[migration]
        if expired:
            self._update()

    def _update(self) -> None:
        self._context = self._identity.context(
            [e.peer for e in self._expected.values()], server=True)

    def _admit(self, frame: dict[str, ty.Any],
               der: bytes | None) -> channel.Hello:
        """:raises ContainerError: why not"""
        hello = channel.Hello.from_frame(frame)
        with self._lock:
            self._forget_expired()
            expected = self._expected.get(hello.migration)
            wrong = None if expected is None else self._identity.check(
                der, expected.peer)
            if expected is None or wrong is not None:
                if wrong is not None:
                    LOG.warning('migration %s: another host wants to be the '
                                'source: %s', hello.migration, wrong)
                # One answer for both: whoever is not of this migration has
                # no business to know whether it exists.
                raise errors.ContainerError(
                    'forbidden',
                    f'migration {hello.migration} is not expected from this '
                    'host', uuid=hello.instance)
            if hello.instance != expected.instance:
                raise errors.ContainerError(
                    'forbidden', f'migration {hello.migration} is of another '
                    'instance', uuid=hello.instance)
            if hello.role not in expected.roles:
                raise errors.ContainerError(
                    'forbidden', f'no {hello.role} connection is expected',
                    uuid=hello.instance)
            key = hello.role, hello.seq
            if key in expected.used or len(expected.used) >= MAX_CONNECTIONS:
                raise errors.ContainerError(
                    'forbidden', f'{hello.role} connection {hello.seq} has '
                    'been before', uuid=hello.instance)
            expected.used.add(key)
        return hello

    # The thread

    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception:
                LOG.exception('The listener for other hosts failed')
                # Whatever it is, it must not use up a processor.
                time.sleep(0.1)
        for stranger in list(self._strangers):
            self._drop(stranger)
        self._selector.close()
        self._socket.close()

    def _turn(self) -> None:
        deadlines = [s.deadline for s in self._strangers]
        wait = (max(0.0, min(deadlines) - time.monotonic())
                if deadlines else None)
        for key, _ in self._selector.select(wait):
            if key.fileobj is self._socket:
                self._accept()
            elif key.data is not None:
                self._serve(key.data)
        now = time.monotonic()
        for stranger in [s for s in self._strangers if s.deadline <= now]:
            if not stranger.refused:
                self._log(stranger.remote, 'it said nothing in time')
            self._drop(stranger)

    def _accept(self) -> None:
        try:
            sock, address = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as e:
            # Such as too many open files: it will still be there next time.
            self._log('a host', f'it cannot be accepted: {e}')
            time.sleep(0.1)
            return
        remote, host = channel.where(address), str(address[0])
        if (len(self._strangers) >= MAX_STRANGERS
                or self._per_host[host] >= MAX_STRANGERS_PER_ADDRESS):
            self._log(remote, 'too many are waiting')
            sock.close()
            return
        try:
            channel.tune(sock)
            with self._lock:
                self._forget_expired()
                context = self._context
            stranger = _Stranger(
                tls.Transport(sock, context, server=True), sock, host,
                remote, self._hello_timeout)
            self._selector.register(
                stranger.transport, selectors.EVENT_READ, stranger)
        except (OSError, ValueError) as e:
            self._log(remote, str(e))
            sock.close()
            return
        self._strangers.add(stranger)
        self._per_host[host] += 1
        self._serve(stranger)

    def _drop(self, stranger: _Stranger) -> None:
        self._let_go(stranger)
        stranger.transport.abort()

    def _let_go(self, stranger: _Stranger) -> None:
        self._strangers.remove(stranger)
        self._per_host[stranger.host] -= 1
        if not self._per_host[stranger.host]:
            del self._per_host[stranger.host]
        self._selector.unregister(stranger.transport)

    def _serve(self, stranger: _Stranger) -> None:
        """Go on with one; whatever it does, the others are not concerned."""
        try:
            if stranger.refused:
                self._drain(stranger)
            else:
                self._greet(stranger)
        except errors.ContainerError as e:
            self._refuse(stranger, e)
        except OSError as e:
            self._refuse(stranger, tls.network_error('it has gone', e))
        except Exception as e:
            LOG.exception('The connection of %s failed', stranger.remote)
            self._refuse(stranger, errors.ContainerError(
                'internal', f'the other host failed: {type(e).__name__}'))
        if stranger in self._strangers:
            events = selectors.EVENT_READ
            if stranger.transport.wants_write:
                events |= selectors.EVENT_WRITE
            self._selector.modify(stranger.transport, events, stranger)

    def _greet(self, stranger: _Stranger) -> None:
        transport = stranger.transport
        if not stranger.shaken:
            if not transport.handshake():
                return
            stranger.shaken = True
        if stranger.hello is None:
            while (frame := stranger.reader.step()) is True:
                pass
            if frame is False:
                return
            if frame is None:
                raise tls.network_error('it left without a hello')
            if stranger.reader.step() is True:
                raise errors.ContainerError(
                    'invalid', 'it says more than its hello before the answer')
            stranger.hello = self._admit(
                frame, transport.peer_certificate())
            transport.write(memoryview(channel.encode(
                {'v': channel.VERSION, 'ok': True}, channel.MAX_HELLO)))
        if transport.flush():
            self._hand_over(stranger, stranger.hello)

    def _hand_over(self, stranger: _Stranger, hello: channel.Hello) -> None:
        channel.tune(stranger.sock, hello.role)
        self._let_go(stranger)
        connection = channel.Connection(
            stranger.transport, hello, stranger.remote)
        try:
            threading.Thread(
                target=self._call, args=(connection,),
                name=f'channel-{hello.role}', daemon=True).start()
        except RuntimeError:
            connection.abort()
            LOG.exception('%r cannot be served', connection)

    def _call(self, connection: channel.Connection) -> None:
        try:
            self._on_connection(connection)
        except Exception:
            LOG.exception('%r failed', connection)
            connection.abort()

    # Those who may not

    def _refuse(self, stranger: _Stranger,
                error: errors.ContainerError) -> None:
        if stranger not in self._strangers:
            return
        if stranger.refused:
            self._drop(stranger)
            return
        self._log(stranger.remote, str(error))
        stranger.refused = True
        stranger.deadline = time.monotonic() + _DRAIN
        try:
            if stranger.shaken and error.code != 'network':
                stranger.transport.write(memoryview(channel.encode(
                    {'v': channel.VERSION, 'ok': False,
                     'error': error.to_dict()}, channel.MAX_HELLO)))
                stranger.transport.end()
            self._drain(stranger)
        except errors.ContainerError:
            self._drop(stranger)

    def _drain(self, stranger: _Stranger) -> None:
        """Closing a socket with unread data would cut off what explains it.
        """
        if not stranger.transport.drained():
            return
        self._drop(stranger)

    def _log(self, remote: str, reason: str) -> None:
        """A port scan must not fill the log."""
        now = time.monotonic()
        if now - self._refusals_since > _LOG_PERIOD:
            if self._refusals > _LOGGED:
                LOG.warning('Refused %d more connections',
                            self._refusals - _LOGGED)
            self._refusals_since, self._refusals = now, 0
        self._refusals += 1
        if self._refusals <= _LOGGED:
            LOG.warning('Refused the connection of %s: %s', remote, reason)

    def close(self) -> None:
        """Accept no more; the connections that were accepted stay."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def __enter__(self) -> 'Listener':
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _bind(address: str, port_range: tuple[int, int]) -> socket.socket:
    first, last = port_range
    problem: OSError | None = None
    try:
        family, _, _, _, where = socket.getaddrinfo(
            address, None, type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE)[0]
    except OSError as e:
        raise tls.network_error(f'{address} is no address', e) from e
    for port in range(first, last + 1):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((where[0], port, *where[2:]))
            sock.listen(128)
            sock.setblocking(False)
        except OSError as e:
            problem = e
            sock.close()
        else:
            return sock
    raise errors.ContainerError(
        'network', f'no port from {first} to {last} of {address} is free',
        cause=str(problem),
        remedy='Check the options for the address and the ports of '
               'migrations')
