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

"""One request to the agent, from its head to its answer."""

import collections.abc as cabc
import http
import http.server
import io
import operator
import os
import socket
import time
import typing as ty
import urllib.parse

from oslo_log import log as logging

from nova_pycontainer.agent import protocol
from nova_pycontainer.agent import verbs
from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: Seconds that a client may be silent within its request.
READ_TIMEOUT: ty.Final = 30.0
#: Seconds that a verb may take, whatever the client says.
MAX_LIMIT: ty.Final = 2 * 86400.0
#: Seconds between two looks whether a waiting client still is there.
POLL_STEP: ty.Final = 1.0


class Late(Exception):
    """A verb did not end in time; it runs on."""


class Server(ty.Protocol):
    """What a request needs of its server."""

    host: ty.Any
    closing: bool

    def run(self, call: cabc.Callable[[], object], limit_s: float) -> object:
        """:raises Late: after ``limit_s`` seconds"""


def answer(error: errors.ContainerError) -> tuple[int, bytes]:
    """Status and body for an error."""
    return errors.CODES[error.code], protocol.dumps(
        {'error': error.to_dict()})


class _Chunked(io.RawIOBase):
    """The body of a request in chunks (RFC 9112, 7.1), as a stream."""

    def __init__(self, source: io.BufferedIOBase) -> None:
        self._source = source
        self._left = 0
        self._done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: ty.Any) -> int:
        try:
            if self._done:
                return 0
            if not self._left:
                self._left = self._size()
                if not self._left:
                    self._done = True
                    self._source.readline(1024)
                    return 0
            view = memoryview(buffer)[:self._left]
            count = self._source.readinto1(view)
            if not count:
                raise self._broken('the connection was closed')
            self._left -= count
            if not self._left and self._source.readline(3) != b'\r\n':
                raise self._broken('a chunk has no end')
            return count
        except OSError as e:
            raise self._broken(str(e)) from e

    def _size(self) -> int:
        line = self._source.readline(1024)
        try:
            return int(line.split(b';')[0].strip() or b'x', 16)
        except ValueError as e:
            raise self._broken(
                'the connection was closed' if not line
                else 'a chunk has no size') from e

    def _broken(self, cause: str) -> errors.ContainerError:
        return errors.ContainerError(
            'image_truncated', 'the image did not arrive completely',
            cause=cause, remedy='Try again')


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = 'HTTP/1.1'
    # What is no HTTP at all is answered in it nevertheless.
    default_request_version = 'HTTP/1.1'
    server_version = 'pycontainer-agent'
    sys_version = ''
    timeout = READ_TIMEOUT
    server: Server  # type: ignore[assignment]
    #: The head of a stream has been sent: it is too late for another answer.
    _streaming = False

    def handle(self) -> None:
        try:
            super().handle()
        except OSError as e:
            LOG.debug('A client went away: %s', e)

    def do_POST(self) -> None:
        self._answered(self._post)

    def do_PUT(self) -> None:
        self._answered(self._put)

    def do_GET(self) -> None:
        self._answered(self._get)

    # Answers

    def _answered(self, call: cabc.Callable[[], object]) -> None:
        """Send what ``call`` returns or raises."""
        self.close_connection = True
        started = time.monotonic()
        status: int = http.HTTPStatus.OK
        try:
            protocol.check_version(
                self.headers.get(protocol.VERSION_HEADER),
                'agent', 'client')
            body = protocol.dumps({'result': call()})
        except errors.ContainerError as e:
            LOG.debug('%s: %s', self.path, e)
            status, body = answer(e)
        except Exception as e:
            if isinstance(e, OSError) and (
                    self._streaming or self._gone()):
                raise
            LOG.exception('%s failed', self.path)
            status, body = answer(protocol.internal(e))
        if self._streaming or self.connection.fileno() < 0:
            # Answered already, or an upgrade: it is somebody else's now.
            return
        LOG.debug('%s: %s after %.3f s', self.path, status,
                  time.monotonic() - started)
        self._send(status, body)

    def _gone(self) -> bool:
        """Whether the client has closed its connection."""
        try:
            # A socket with a time-out waits whatever the flags of recv say.
            return protocol.readable(self.connection) and not (
                self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return True

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(body)

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(code, message)
        self.send_header(protocol.VERSION_HEADER, str(protocol.VERSION))

    def send_error(
        self, code: int, message: str | None = None,
        explain: str | None = None,
    ) -> None:
        """What http.server itself refuses, in our own form."""
        self.close_connection = True
        _status, body = answer(errors.ContainerError(
            'invalid', message or http.HTTPStatus(code).phrase))
        self._send(code, body)

    # Requests

    def _post(self) -> object:
        path = urllib.parse.urlsplit(self.path).path
        name = path.removeprefix(protocol.PREFIX)
        verb = verbs.VERBS.get(name)
        if verb is None or not path.startswith(protocol.PREFIX):
            raise errors.ContainerError(
                'unsupported', f'there is no verb {name!r}')
        params = verbs.check(name, self._body(verb))
        method = operator.attrgetter(verb.method)(self.server.host)
        if name == 'console_attach':
            return self._upgrade(method, params)
        if verb.waits:
            return self._wait(method, **params)
        limit = self._limit(verbs.limit(verb, params))
        try:
            return self.server.run(lambda: method(**params), limit)
        except Late as e:
            raise errors.ContainerError(
                'timeout', f'{name} did not end within {limit:g} s',
                uuid=params.get('uuid'),
                remedy='It goes on in the background. See the log of '
                       'pycontainer-agent on that host') from e

    def _wait(
        self, method: cabc.Callable[..., object], *, after: int,
        timeout_s: float,
    ) -> object:
        """A long poll; it ends early with the server, or the client."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            found = method(after=after, timeout_s=max(
                min(left, POLL_STEP), 0))
            if (found or left <= POLL_STEP or self.server.closing or
                    self._gone()):
                return found

    def _body(self, verb: verbs.Verb) -> object:
        try:
            length = int(self.headers.get('Content-Length', ''))
        except ValueError:
            length = -1
        if length < 0 or self.headers.get('Transfer-Encoding'):
            raise errors.ContainerError(
                'invalid', 'the request has no Content-Length')
        if length > verb.max_body:
            raise errors.ContainerError(
                'invalid', f'the request has {length} bytes, more than '
                f'{verb.max_body}')
        data = self.rfile.read(length)
        if len(data) != length:
            raise errors.ContainerError('invalid', 'the request is cut off')
        try:
            return protocol.loads(data)
        except ValueError as e:
            raise errors.ContainerError(
                'invalid', 'the request is not JSON', cause=str(e)) from e

    def _limit(self, default: float) -> float:
        text = self.headers.get(protocol.LIMIT_HEADER)
        try:
            limit = float(text) if text else default
        except ValueError:
            limit = -1.0
        # Not a number is not greater than 0 either.
        if not limit > 0:
            raise errors.ContainerError(
                'invalid', f'the time-out {text!r} is no number of seconds')
        return min(limit, MAX_LIMIT)

    def _put(self) -> object:
        url = urllib.parse.urlsplit(self.path)
        key = url.path.removeprefix(protocol.LAYERS)
        if not url.path.startswith(protocol.LAYERS):
            raise errors.ContainerError(
                'unsupported', 'there is nothing to put here')
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            raise errors.ContainerError(
                'invalid', 'the image does not come in chunks')
        query = dict(urllib.parse.parse_qsl(url.query, strict_parsing=bool(
            url.query)))
        unknown = set(query) - {'image', 'max_bytes', 'digest'}
        algorithm, _, value = query.get('digest', '').partition(':')
        try:
            max_bytes = int(query['max_bytes']) if (
                'max_bytes' in query) else None
        except ValueError:
            max_bytes = -1
        if unknown or not query.get('image') or (
                'digest' in query and not value) or (
                max_bytes is not None and max_bytes < 0):
            raise errors.ContainerError(
                'invalid', 'wrong parameters of a layer import',
                remedy='Give image, max_bytes in bytes, and digest as '
                       '<algorithm>:<hex>')
        # Glance's store may be slow; the client has a limit for the whole.
        self.connection.settimeout(protocol.STREAM_IDLE)
        stream = io.BufferedReader(_Chunked(self.rfile), 1 << 17)
        return self.server.host.layer_import(
            key, stream, image=query['image'], max_bytes=max_bytes,
            digest=(algorithm, value) if value else None)

    def _get(self) -> object:
        uuid = self.path.removeprefix(protocol.SNAPSHOTS)
        if not self.path.startswith(protocol.SNAPSHOTS):
            raise errors.ContainerError(
                'unsupported', 'there is nothing to get here')
        try:
            with self.server.host.snapshots.take(
                    uuid, lambda: self.server.closing or self._gone()
            ) as pieces:
                self._stream(pieces)
        except errors.ContainerError as e:
            if not self._streaming:
                raise
            # The client notices that the end is missing.
            LOG.error('%s', e)
        return None

    def _stream(self, pieces: cabc.Iterable[bytes]) -> None:
        """Answer with a stream, whose last chunk says that it is whole."""
        # The reader may be slow: Glance's store.
        self.connection.settimeout(protocol.STREAM_IDLE)
        for piece in pieces:
            if not self._streaming:
                # Not before there is a first piece: until then an error has
                # an answer of its own.
                self._streaming = True
                self.send_response(http.HTTPStatus.OK)
                self.send_header('Content-Type', 'application/x-tar')
                self.send_header('Transfer-Encoding', 'chunked')
                self.send_header('Connection', 'close')
                self.end_headers()
            self.wfile.write(b'%x\r\n%b\r\n' % (len(piece), piece))
        self.wfile.write(b'0\r\n\r\n')

    def _upgrade(
        self, connect: cabc.Callable[..., object],
        params: dict[str, ty.Any],
    ) -> object:
        """Hand the connection over to whoever holds the console.

        So an attached console goes on when the agent ends.
        """
        if self.headers.get('Upgrade', '').lower() != 'raw':
            raise errors.ContainerError(
                'invalid', 'console_attach needs "Upgrade: raw"')

        def accept() -> socket.socket:
            self.send_response(http.HTTPStatus.SWITCHING_PROTOCOLS)
            self.send_header('Connection', 'Upgrade')
            self.send_header('Upgrade', 'raw')
            self.end_headers()
            accepted.append(True)
            return ty.cast(socket.socket, self.connection)

        accepted: list[bool] = []
        try:
            connect(params['uuid'], accept)
        except Exception:
            if not accepted:
                raise
            # Too late to answer: all that is left is to hang up.
            LOG.exception('%s: the console cannot be attached',
                          params['uuid'])
        # Without shutdown(), which would end the other's copy too.
        os.close(self.connection.detach())
        return None

    def address_string(self) -> str:
        return 'unix'

    def log_message(self, format: str, *args: object) -> None:
        LOG.debug(format, *args)
