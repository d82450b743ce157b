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

"""Interactive consoles over TCP, for nova-serialproxy.

One listener for all containers of the host. A client names the console that
it wants by a path that nobody can guess::

    CONNECT /<secret> HTTP/1.1

which is what Nova's proxies send for a console with an
``internal_access_path``. The keeper holds the stream from then on: it
outlives this process.

The secret is computed from the container's uuid and a key of this host, so
that it is the same at each question and different after a migration.
"""

import collections.abc as cabc
import contextlib
import hmac
import os
import pathlib
import secrets
import socket
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

#: Seconds and bytes that a client has for its request.
_PATIENCE = 10.0
_MAX_REQUEST = 1024
#: Clients that have not said yet what they want.
_STRANGERS = 64
_KEY_BYTES = 32
_END = b'\r\n\r\n'


def load_key(path: pathlib.Path) -> bytes:
    """The key of this host, made when it is not there yet."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = secrets.token_bytes(_KEY_BYTES)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                 0o600)
    with os.fdopen(fd, 'wb') as f:
        f.write(key)
    return key


class Consoles:
    """The listener.

    :param address: to bind to
    :param port: 0 for one of the kernel's choice
    :raises ContainerError: ``network``
    """

    def __init__(
        self, owner: 'host.Host', key: bytes, address: str, port: int
    ) -> None:
        self._host = owner
        self._key = key
        self._strangers = threading.BoundedSemaphore(_STRANGERS)
        try:
            self._socket = socket.create_server((address, port), family=(
                socket.AF_INET6 if ':' in address else socket.AF_INET))
        except OSError as e:
            raise errors.ContainerError(
                'network', f'cannot listen on {address}:{port} for consoles',
                cause=str(e), remedy='Set [pycontainer] console_listen and '
                'console_port to an address and a port that are free') from e
        self.port = int(self._socket.getsockname()[1])
        self._closing = False
        self._thread = threading.Thread(
            target=self._run, name='consoles', daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more clients; those that are connected stay."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(_PATIENCE)

    def token(self, uuid: str) -> dict[str, ty.Any]:
        """How to connect to the console of a container that is not down.

        :returns: ``port`` and ``path``
        :raises ContainerError: ``not_found``, ``bad_state``
        """
        self._host.entry(uuid).require('created', 'running', 'paused')
        return {'port': self.port, 'path': '/' + self._secret(uuid)}

    def connect(
        self, uuid: str, accept: cabc.Callable[[], socket.socket]
    ) -> None:
        """Connect a stream to the console of a container that is not down.

        The keeper holds the stream from then on, so it outlives this
        process; the caller closes its own copy.

        :param accept: gives the stream, and is called only if there is a
            console
        """
        self._host.entry(uuid).require('created', 'running', 'paused')
        self._host.keeper.attach(uuid, accept().fileno())

    def attach(self, uuid: str) -> socket.socket:
        """A new stream to and from the console; see :meth:`connect`."""
        ours, theirs = socket.socketpair()
        try:
            self.connect(uuid, lambda: theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    def _secret(self, uuid: str) -> str:
        return hmac.digest(self._key, uuid.encode(), 'sha256').hex()

    def _run(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError as e:
                if self._closing:
                    return
                LOG.warning('no client for a console: %s', e)
                time.sleep(1)
                continue
            if not self._strangers.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(
                target=self._serve, args=(client,), name='console-client',
                daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                uuid = self._wanted(client)
                if uuid is None:
                    # Without an answer Nova's proxy would wait for ever.
                    client.sendall(b'HTTP/1.1 403 Forbidden' + _END)
                    return
                self._connect(client, uuid)
            except OSError as e:
                LOG.info('a client for a console went away: %s', e)
            finally:
                self._strangers.release()

    def _connect(self, client: socket.socket, uuid: str) -> None:
        def accept() -> socket.socket:
            client.sendall(b'HTTP/1.1 200 OK' + _END)
            return client

        try:
            self.connect(uuid, accept)
        except errors.ContainerError as e:
            LOG.info('instance %s: its console: %s', uuid, e)
            client.sendall(b'HTTP/1.1 409 Conflict' + _END)

    def _wanted(self, client: socket.socket) -> str | None:
        """The container whose console a client asks for."""
        deadline = time.monotonic() + _PATIENCE
        request = b''
        while not request.endswith(_END):
            client.settimeout(max(deadline - time.monotonic(), 0.001))
            # Not one byte more: what follows is typed.
            byte = client.recv(1)
            request += byte
            if not byte or len(request) > _MAX_REQUEST:
                return None
        client.settimeout(None)
        words = request.split(b'\r\n')[0].split(b' ')
        if len(words) != 3 or words[0] != b'CONNECT':
            return None
        found = None
        for info in self._host.list():
            # All of them, for the time that it takes tells nothing then.
            if hmac.compare_digest(
                    words[1], b'/' + self._secret(info['uuid']).encode()):
                found = str(info['uuid'])
        return found
