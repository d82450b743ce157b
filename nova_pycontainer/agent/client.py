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

"""Client of the agent: what the driver and the ``pycontainer`` command use.

Needs neither root nor Nova, and loads nothing of the runtime but its errors.
"""

import collections.abc as cabc
import contextlib
import http.client
import socket
import typing as ty
import urllib.parse

from nova_pycontainer.agent import connections
from nova_pycontainer.agent import protocol
from nova_pycontainer.agent import stream
from nova_pycontainer.runtime import errors

Json = dict[str, ty.Any]
# Within the class, list is a verb.
_List = list[Json]

#: Bytes of an image that are sent at a time.
_PIECE: ty.Final = 1 << 17
#: Seconds more than for others: a disk may have millions of files.
_DELETE_S: ty.Final = 240.0
#: Seconds in which the agent asks another host, and ends a migration.
_RESOLVE_S: ty.Final = 150.0


class Client:
    """The agent's verbs, as methods.

    Thread safe: every call has a connection of its own. The names and
    parameters are those of :class:`nova_pycontainer.runtime.host.Host`,
    where they are explained; results are plain JSON data.

    Every method raises :class:`errors.AgentUnavailable` if the agent cannot
    be reached or does not answer at all, and any other
    :class:`errors.ContainerError` that the agent answers with: ``timeout``
    for a verb that is still at work after its limit.

    :param timeout_s: seconds that the agent has for a verb, besides what the
        verb is told to wait for
    :param patience_s: seconds that requests wait for an agent that has just
        gone away, as it does in a restart
    """

    def __init__(
        self, socket_path: str, timeout_s: float = 60.0,
        patience_s: float = 0.0,
    ) -> None:
        self._path = socket_path
        self._timeout_s = float(timeout_s)
        self._patience = connections.Patience(patience_s)

    def _connection(
        self, limit: float, patient: bool = True
    ) -> connections.Connection:
        return connections.Connection(
            self._path, limit + protocol.GRACE,
            self._patience if patient else None)

    def _call(
        self, verb: str, params: Json | None = None, wait_s: float = 0.0,
        patient: bool = True,
    ) -> ty.Any:
        limit = self._timeout_s + wait_s
        connection = self._connection(limit, patient)
        try:
            try:
                connection.request(
                    'POST', protocol.PREFIX + verb,
                    protocol.dumps(params or {}),
                    {**self._headers(limit),
                     'Content-Type': 'application/json'})
            except OSError:
                # Refused before all of it was read: the answer says why.
                pass
            return self._result(connection, verb)
        finally:
            connection.close()

    @staticmethod
    def _headers(limit: float) -> dict[str, str]:
        return {protocol.VERSION_HEADER: str(protocol.VERSION),
                protocol.LIMIT_HEADER: f'{limit:g}',
                'Connection': 'close'}

    def _result(
        self, connection: connections.Connection, verb: str
    ) -> ty.Any:
        response = self._response(connection, verb)
        return _parsed(
            response.headers.get(protocol.VERSION_HEADER),
            self._read(response, connection, verb), verb)

    @staticmethod
    def _response(
        connection: connections.Connection, verb: str
    ) -> http.client.HTTPResponse:
        with connections.answering(connection, verb):
            return connection.getresponse()

    @staticmethod
    def _read(
        response: http.client.HTTPResponse,
        connection: connections.Connection, verb: str,
    ) -> bytes:
        with connections.answering(connection, verb):
            return response.read()

    # View

    def host_info(self) -> Json:
        return ty.cast(Json, self._call('host_info'))

    def list(self) -> _List:
        return ty.cast(_List, self._call('list'))

    def info(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('info', {'uuid': uuid}))

    def find(self, uuid: str) -> Json | None:
        """What :meth:`info` says of a container, or None if there is none.
        """
        try:
            return self.info(uuid)
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            return None

    def events(self, after: int, timeout_s: float) -> _List:
        """Events after number ``after``; waits for one at most so long.

        An empty list may come early.
        """
        timeout_s = min(timeout_s, protocol.MAX_POLL)
        return ty.cast(_List, self._call(
            'events', {'after': after, 'timeout_s': timeout_s}, timeout_s,
            # By them it is noticed that it has gone.
            patient=False))

    # Layers

    def layer_present(self, key: str) -> bool:
        return bool(self._call('layer_present', {'key': key}))

    def layer_list(self) -> _List:
        return ty.cast(_List, self._call('layer_list'))

    def layer_delete(self, key: str) -> None:
        self._call('layer_delete', {'key': key}, 300.0)

    def layer_import(
        self, key: str, stream: ty.BinaryIO | cabc.Iterable[bytes], *,
        image: str, max_bytes: int | None = None, digest: str | None = None,
    ) -> Json:
        """Send an image, and have it unpacked.

        Without a limit for the whole: the stream ends it by raising, which
        passes through here and makes the agent drop what it has.

        :param max_bytes: largest size as unpacked
        :param digest: ``<algorithm>:<hex>`` that the stream must have
        """
        query = {'image': image}
        if max_bytes is not None:
            query['max_bytes'] = str(max_bytes)
        if digest is not None:
            query['digest'] = digest
        connection = self._connection(protocol.STREAM_IDLE)
        try:
            connection.putrequest(
                'PUT', protocol.LAYERS + urllib.parse.quote(key, '') + '?'
                + urllib.parse.urlencode(query))
            for name, value in {
                    **self._headers(self._timeout_s),
                    'Content-Type': 'application/octet-stream',
                    'Transfer-Encoding': 'chunked'}.items():
                connection.putheader(name, value)
            try:
                connection.endheaders()
            except OSError as e:
                raise connections.lost('layer_import', e) from e
            self._send_pieces(connection, stream)
            return ty.cast(Json, self._result(connection, 'layer_import'))
        finally:
            connection.close()

    @staticmethod
    def _send_pieces(
        connection: connections.Connection,
        stream: ty.BinaryIO | cabc.Iterable[bytes],
    ) -> None:
        for piece in _pieces(stream):
            # Nothing is to be heard before the end but a refusal, or that
            # another has made the layer meanwhile.
            if protocol.readable(connection.sock):
                return
            try:
                connection.send(b'%x\r\n%b\r\n' % (len(piece), piece))
            except OSError:
                return
        with contextlib.suppress(OSError):
            connection.send(b'0\r\n\r\n')

    # Snapshots

    def snapshot(self, uuid: str) -> stream.Stream:
        """The root file system of a container as a tar archive, to be closed.

        Returns when there is something to read: the files that the guest has
        written are copied before.
        """
        connection = self._connection(protocol.SNAPSHOT_LIMIT)
        try:
            with contextlib.suppress(OSError):
                # Refused at once; the answer says why.
                connection.request(
                    'GET', protocol.SNAPSHOTS + urllib.parse.quote(uuid, ''),
                    headers=self._headers(protocol.SNAPSHOT_LIMIT))
            sock = connection.sock
            response = self._response(connection, 'snapshot')
            version = response.headers.get(protocol.VERSION_HEADER)
            if response.headers.get_content_type() != stream.TYPE:
                _parsed(version, self._read(response, connection, 'snapshot'),
                        'snapshot')
                raise connections.lost(
                    'snapshot', ValueError('no archive came'))
            protocol.check_version(version, 'client', 'agent')
            sock.settimeout(protocol.STREAM_IDLE)
            return stream.Stream(connection, response, uuid)
        except BaseException:
            connection.close()
            raise

    # Network

    def plug(self, uuid: str, nics: cabc.Sequence[Json]) -> None:
        self._call('plug', {'uuid': uuid, 'nics': [*nics]})

    def unplug(self, uuid: str, devnames: cabc.Sequence[str]) -> None:
        self._call('unplug', {'uuid': uuid, 'devnames': [*devnames]})

    def interface_attach(self, uuid: str, nic: Json) -> Json:
        """Give a container one more interface, at once if it runs."""
        return ty.cast(Json, self._call(
            'interface_attach', {'uuid': uuid, 'nic': nic}))

    def interface_detach(self, uuid: str, devname: str) -> Json:
        """Take an interface away, by the name of its outer end."""
        return ty.cast(Json, self._call(
            'interface_detach', {'uuid': uuid, 'devname': devname}))

    def volume_attach(self, uuid: str, volume: Json) -> Json:
        """Give a container one more volume, at once if it runs."""
        return ty.cast(Json, self._call(
            'volume_attach', {'uuid': uuid, 'volume': volume}))

    def volume_detach(self, uuid: str, volume: str) -> Json:
        """Take a volume away, by its id, unless it is in use."""
        return ty.cast(Json, self._call(
            'volume_detach', {'uuid': uuid, 'volume': volume}))

    def volume_swap(self, uuid: str, old: str, volume: Json) -> Json:
        """Begin to put a volume in the place of another."""
        return ty.cast(Json, self._call('volume_swap', {
            'uuid': uuid, 'old': old, 'volume': volume}))

    def volume_swap_status(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('volume_swap_status', {'uuid': uuid}))

    def volume_swap_abort(self, uuid: str) -> None:
        self._call('volume_swap_abort', {'uuid': uuid})

    # Life

    def define(self, uuid: str, spec: Json) -> Json:
        return ty.cast(
            Json, self._call('define', {'uuid': uuid, 'spec': spec}))

    def prepare(self, uuid: str, changes: Json | None = None) -> Json:
        return ty.cast(Json, self._call(
            'prepare', {'uuid': uuid, 'changes': changes}))

    def start_container(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('start', {'uuid': uuid}))

    def stop(self, uuid: str, timeout_s: float) -> Json:
        return ty.cast(Json, self._call(
            'stop', {'uuid': uuid, 'timeout_s': timeout_s}, timeout_s))

    def kill(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('kill', {'uuid': uuid}))

    def reboot(
        self, uuid: str, timeout_s: float, changes: Json | None = None
    ) -> Json:
        return ty.cast(Json, self._call(
            'reboot',
            {'uuid': uuid, 'timeout_s': timeout_s, 'changes': changes},
            timeout_s))

    def pause(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('pause', {'uuid': uuid}))

    def unpause(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('unpause', {'uuid': uuid}))

    def suspend(self, uuid: str) -> Json:
        """Write a running container with its memory to its disk."""
        return ty.cast(Json, self._call('suspend', {'uuid': uuid}, 1740.0))

    def resume(self, uuid: str, changes: Json | None = None) -> Json:
        """Let a suspended container go on."""
        return ty.cast(Json, self._call(
            'resume', {'uuid': uuid, 'changes': changes}, 1740.0))

    def delete(self, uuid: str, keep_disk: bool = False) -> None:
        self._call(
            'delete', {'uuid': uuid, 'keep_disk': keep_disk}, _DELETE_S)

    def quiesce(self, uuid: str, limit_s: float) -> Json:
        """Let a container stand still, for that many seconds at most."""
        return ty.cast(Json, self._call(
            'quiesce', {'uuid': uuid, 'limit_s': limit_s}))

    def unquiesce(self, uuid: str) -> Json:
        return ty.cast(Json, self._call('unquiesce', {'uuid': uuid}))

    # Rescue

    def rescue(self, uuid: str, spec: Json) -> Json:
        """Give a container that is down another root, until the end."""
        return ty.cast(
            Json, self._call('rescue', {'uuid': uuid, 'spec': spec}))

    def unrescue(self, uuid: str) -> Json:
        """Kill it, and give it its own root again."""
        return ty.cast(
            Json, self._call('unrescue', {'uuid': uuid}, _DELETE_S))

    # Migration

    def migration_prepare(
        self, uuid: str, migration: str, spec: Json, source: Json,
        options: Json | None = None,
    ) -> Json:
        """Make this host ready to receive; returns what the source needs."""
        return ty.cast(Json, self._call('migration_prepare', {
            'uuid': uuid, 'migration': migration, 'spec': spec,
            'source': source, 'options': options}, 120.0))

    def migration_begin(
        self, uuid: str, migration: str, destination: Json,
        options: Json | None = None,
    ) -> Json:
        """Start to move a container away; returns at once."""
        return ty.cast(Json, self._call('migration_begin', {
            'uuid': uuid, 'migration': migration,
            'destination': destination, 'options': options}))

    def migration_status(self, migration: str, wait_s: float = 0.0) -> Json:
        """How far it is, waiting at most ``wait_s`` seconds for its end."""
        return ty.cast(Json, self._call('migration_status', {
            'migration': migration, 'wait_s': wait_s}, wait_s))

    def migration_force_complete(self, migration: str) -> None:
        """Freeze the guest now, whatever is still to be copied."""
        self._call('migration_force_complete', {'migration': migration})

    def migration_abort(self, migration: str, reason: str) -> None:
        """End it before its commit; returns when it has ended."""
        self._call('migration_abort', {
            'migration': migration, 'reason': reason}, 60.0)

    def migration_resolve(self, uuid: str, runs: str) -> Json:
        """Settle a migration whose other host will never answer again.

        :param runs: ``here`` or ``elsewhere``, as for
            :meth:`.migrations.Migrations.resolve`
        """
        return ty.cast(Json, self._call(
            'migration_resolve', {'uuid': uuid, 'runs': runs},
            _RESOLVE_S))

    def transfer_offer(
        self, uuid: str, migration: str, destination: Json,
        options: Json | None = None,
    ) -> Json:
        """Let another host have a container that is down; it is not started
        here until that is withdrawn.

        :returns: ``facts`` for :meth:`transfer_take` there
        """
        return ty.cast(Json, self._call('transfer_offer', {
            'uuid': uuid, 'migration': migration,
            'destination': destination, 'options': options}))

    def transfer_withdraw(self, uuid: str) -> Json:
        """It stays here. Idempotent."""
        return ty.cast(Json, self._call('transfer_withdraw', {'uuid': uuid}))

    def transfer_describe(
        self, uuid: str, migration: str, source_host: Json,
    ) -> Json:
        """What :meth:`transfer_offer` has returned on another host.

        :raises ContainerError: that host does not offer it to this one, or
            cannot be reached
        """
        return ty.cast(Json, self._call('transfer_describe', {
            'uuid': uuid, 'migration': migration,
            'source_host': source_host}, 120.0))

    def transfer_take(
        self, uuid: str, migration: str, spec: Json, facts: Json,
        options: Json | None = None,
    ) -> Json:
        """Start to copy a container that another host offers.

        :meth:`migration_status` tells how it goes. What has come of one that
        fails is not started, and :meth:`transfer_resume` goes on with it.
        """
        return ty.cast(Json, self._call('transfer_take', {
            'uuid': uuid, 'migration': migration, 'spec': spec,
            'facts': facts, 'options': options}, 120.0))

    def transfer_resume(self, uuid: str) -> Json:
        """Go on with a copy that has failed, as :meth:`transfer_take`."""
        return ty.cast(Json, self._call('transfer_resume', {'uuid': uuid}))

    def migration_check_source(self, uuid: str) -> Json:
        """What of a container has to move, and what cannot.

        :returns: ``facts`` for :meth:`migration_check_destination`,
            ``problems`` and ``warnings``, each with ``name``, ``process``,
            ``reason``, ``remedy``
        """
        return ty.cast(Json, self._call(
            'migration_check_source', {'uuid': uuid}, 60.0))

    def migration_check_destination(self, facts: Json) -> Json:
        """Whether this host could take it: ``problems`` and ``warnings``."""
        return ty.cast(Json, self._call(
            'migration_check_destination', {'facts': facts}))

    def preflight(self) -> Json:
        """Check now what this host can do; takes some seconds."""
        return ty.cast(Json, self._call('preflight', {}, 300.0))

    # In the guest

    def exec(
        self, uuid: str, argv: cabc.Sequence[str], *, stdin: bytes = b'',
        env: cabc.Mapping[str, str] | None = None, timeout_s: float = 30.0,
        max_output: int = 1 << 20,
    ) -> Json:
        """``{"exit_code", "stdout", "stderr", "truncated"}``, as bytes."""
        return ty.cast(Json, self._call('exec', {
            'uuid': uuid, 'argv': [*argv], 'stdin': stdin,
            'env': None if env is None else dict(env),
            'timeout_s': timeout_s, 'max_output': max_output}, timeout_s))

    def console_log(self, uuid: str, max_bytes: int = 102400) -> bytes:
        return bytes(self._call(
            'console_log', {'uuid': uuid, 'max_bytes': max_bytes}))

    def console_token(self, uuid: str) -> Json:
        """``port`` and ``path`` of a console, for a TCP client."""
        return ty.cast(Json, self._call('console_token', {'uuid': uuid}))

    def console_attach(self, uuid: str) -> socket.socket:
        """A stream to and from the console.

        It is the keeper's other end, so it goes on when the agent ends. The
        latest that attached is the one who types.
        """
        body = protocol.dumps({'uuid': uuid})
        connection = self._connection(self._timeout_s)
        connection.connect()
        sock = connection.sock
        try:
            head = ''.join(f'{name}: {value}\r\n' for name, value in {
                **self._headers(self._timeout_s), 'Host': 'localhost',
                'Connection': 'Upgrade', 'Upgrade': 'raw',
                'Content-Length': str(len(body))}.items())
            try:
                sock.sendall(
                    f'POST {protocol.PREFIX}console_attach HTTP/1.1\r\n'
                    f'{head}\r\n'.encode() + body)
            except OSError:
                # Refused; the answer says why.
                pass
            status, version = self._head(sock)
            if status != 101:
                _parsed(version, self._rest(sock), 'console_attach')
                raise connections.lost(
                    'console_attach',
                    ValueError(f'unexpected status {status}'))
            protocol.check_version(version, 'client', 'agent')
            sock.settimeout(None)
            return sock
        except BaseException:
            sock.close()
            raise

    @staticmethod
    def _head(sock: socket.socket) -> tuple[int, str | None]:
        """Read a head, and not one byte more: what follows is raw."""
        head = b''
        try:
            while not head.endswith(b'\r\n\r\n') and len(head) < 65536:
                byte = sock.recv(1)
                if not byte:
                    raise ConnectionError('connection closed')
                head += byte
            first, _, rest = head.partition(b'\r\n')
            status = int(first.split()[1])
        except (OSError, ValueError, IndexError) as e:
            raise connections.lost('console_attach', e) from e
        for line in rest.decode('latin-1').splitlines():
            name, _, value = line.partition(':')
            if name.lower() == protocol.VERSION_HEADER.lower():
                return status, value.strip()
        return status, None

    @staticmethod
    def _rest(sock: socket.socket) -> bytes:
        data = b''
        try:
            while more := sock.recv(65536):
                data += more
        except OSError as e:
            raise connections.lost('console_attach', e) from e
        return data


def _parsed(version: str | None, body: bytes, verb: str) -> ty.Any:
    """The result in an answer, or the error in it raised."""
    protocol.check_version(version, 'client', 'agent')
    try:
        answer = protocol.loads(body)
        if 'error' in answer:
            raise errors.ContainerError.from_dict(answer['error'])
        return answer['result']
    except (ValueError, TypeError, KeyError) as e:
        raise connections.lost(verb, e) from e


def _pieces(
    stream: ty.BinaryIO | cabc.Iterable[bytes]
) -> cabc.Iterator[bytes]:
    """Parts of moderate size, none of them empty: that would be the end."""
    source: cabc.Iterable[bytes]
    if hasattr(stream, 'read'):
        source = iter(lambda: stream.read(_PIECE), b'')
    else:
        source = stream
    for part in source:
        for start in range(0, len(part), _PIECE):
            yield part[start:start + _PIECE]
