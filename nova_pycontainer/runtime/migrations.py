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

"""Migrations of a host's containers: the verbs, and who is under way.
"""

import collections
import contextlib
import pathlib
import socket
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import destination as dst
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import listener
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import source as src

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

_KEEP = 200
#: A destination waits this long for its source.
_EXPECT = 1800.0
_END_TIMEOUT = 60.0

Info = dict[str, ty.Any]


class Migrations:
    """The migrations from and to one host."""

    def __init__(self, owner: 'host.Host', config: rconfig.Config) -> None:
        self._host = owner
        self._config = config
        self._lock = threading.Lock()
        self._ended: collections.OrderedDict[str, protocol.Progress] = (
            collections.OrderedDict())
        self._sources: dict[str, src.Source] = {}
        self._destinations: dict[str, dst.Destination] = {}
        self._changed = threading.Condition()
        self._listener: listener.Listener | None = None

    def start(self) -> None:
        """Open the listener.

        :raises ContainerError: ``network``: the address is not ours
        """
        c = self._config
        self._identity = keys.Identity.load_or_create(
            c.state_dir / 'keys', socket.gethostname())
        self._criu = criu.Criu(c.criu_path, self._host.keeper)
        self._listener = listener.Listener(
            c.migration_listen, c.migration_ports, self._identity,
            self._connected)

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def identity(self) -> Info:
        """What a source has to know of this host."""
        assert self._listener is not None
        return {
            'protocol': protocol.VERSION,
            'certificate': self._identity.certificate,
            'fingerprint': self._identity.fingerprint(),
            'address': self._config.migration_address,
            'port': self._listener.port,
        }

    # Destination

    def prepare(
        self, uuid: str, migration: str, spec: Info, source: Info,
        options: Info | None = None,
    ) -> Info:
        """Make this host ready for a container; see :mod:`.destination`.

        :param spec: as for :meth:`.host.Host.define`, with ``base_id``
        :param source: ``certificate`` of the source's agent
        :returns: where the source has to connect to
        """
        rconfig.check_uuid(migration)
        opts = protocol.Options.from_dict(options or {})
        assert self._listener is not None
        self._host.define(uuid, spec)
        progress = protocol.Progress(migration, uuid, 'destination')
        try:
            entry = self._host.entry(uuid)
            item = entry.container
            incoming = dst.Destination(
                item, self._host.layer_root(item), self._criu, progress,
                self._directory(migration), opts.bandwidth,
                on_running=lambda: self._arrived(uuid, migration),
                on_failed=lambda: self._failed(uuid, migration))
            incoming.prepare()
        except BaseException:
            self._host.delete(uuid)
            raise
        entry.migration = incoming
        with self._lock:
            self._destinations[migration] = incoming
        self._listener.expect(
            migration, uuid, keys.Peer(str(source['certificate']), (
                str(source.get('address')),)), dst.ROLES, _EXPECT)
        return self.identity()

    def _directory(self, migration: str) -> pathlib.Path:
        return self._config.run_dir / 'migration' / migration

    def _connected(self, connection: channel.Connection) -> None:
        with self._lock:
            incoming = self._destinations.get(connection.hello.migration)
        if incoming is None:
            connection.close()
            return
        incoming.connected(connection)

    def _arrived(self, uuid: str, migration: str) -> None:
        self._host.watch(uuid)
        self._host.entry(uuid).migration = None
        self._host.note('started', uuid)
        self._end(migration, keep=True)

    def _failed(self, uuid: str, migration: str) -> None:
        with contextlib.suppress(errors.ContainerError):
            self._host.entry(uuid).migration = None
            self._host.delete(uuid)
        self._end(migration, keep=True)

    def _end(self, migration: str, keep: bool) -> None:
        with self._lock:
            incoming = self._destinations.get(migration)
        if incoming is not None:
            self._remember(incoming.progress)

    def _remember(self, progress: protocol.Progress) -> None:
        with self._changed:
            self._ended[progress.migration] = progress
            while len(self._ended) > _KEEP:
                old, _ = self._ended.popitem(last=False)
                self._destinations.pop(old, None)
            self._changed.notify_all()

    # Source

    def begin(
        self, uuid: str, migration: str, destination: Info,
        options: Info | None = None,
    ) -> Info:
        """Start to move a container away; :meth:`status` tells how it goes.

        :param destination: what :meth:`prepare` returned there
        """
        rconfig.check_uuid(migration)
        opts = protocol.Options.from_dict(options or {})
        entry = self._host.entry(uuid)
        with self._host.locked(uuid):
            self._host.require(entry, 'running', 'paused')
            if entry.migration is not None:
                raise errors.ContainerError(
                    'bad_state', 'the instance is being migrated already',
                    uuid=uuid)
            progress = protocol.Progress(migration, uuid, 'source')
            item = entry.container
            outgoing = src.Source(
                item, self._host.layer_root(item), self._criu,
                self._identity, src.Endpoint.from_dict(destination), opts,
                progress, self._directory(migration))
            entry.migration = outgoing
        with self._lock:
            self._sources[migration] = outgoing
        threading.Thread(
            target=self._run, args=(uuid, migration, outgoing),
            name=f'outgoing-{uuid[:8]}', daemon=True).start()
        return progress.to_dict()

    def _run(
        self, uuid: str, migration: str, outgoing: src.Source
    ) -> None:
        progress = outgoing.progress
        entry = self._host.entry(uuid)
        try:
            # Who wants to change the container meanwhile waits for the end,
            # or aborts first.
            with entry.lock:
                outgoing.run()
                self._gone(uuid, migration)
            progress.phase = protocol.Phase.COMPLETED
        except BaseException as e:
            if not isinstance(e, errors.ContainerError):
                LOG.exception('instance %s: the migration failed', uuid)
                e = errors.ContainerError(
                    'internal', 'the migration failed', uuid=uuid,
                    cause=repr(e))
            LOG.warning('instance %s: migration %s: %s', uuid, migration, e)
            progress.error = e.to_dict()
            if progress.phase not in protocol.ENDED:
                progress.phase = protocol.Phase.FAILED
        finally:
            entry.migration = None
            with self._lock:
                self._sources.pop(migration, None)
            self._remember(progress)

    def _gone(self, uuid: str, migration: str) -> None:
        """It runs on the other host: nothing of it may run here again."""
        item = self._host.entry(uuid).container
        item.kill()
        item.teardown()
        item.st.run = None
        item.st.moved = {'migration': migration, 'at': time.time()}
        item.st.save(item.directory)
        protocol.Journal(item.directory).remove()

    # Both

    def status(self, migration: str, wait_s: float = 0.0) -> Info:
        """How far it is, waiting at most ``wait_s`` seconds for its end.

        :raises ContainerError: ``not_found``
        """
        with self._changed:
            if wait_s:
                self._changed.wait_for(
                    lambda: migration in self._ended, min(wait_s, 300.0))
            progress = self._ended.get(migration)
        if progress is None:
            with self._lock:
                job = (self._sources.get(migration) or
                       self._destinations.get(migration))
            if job is None:
                raise errors.ContainerError(
                    'not_found', f'there is no migration {migration} here')
            progress = job.progress
        return progress.to_dict()

    def force_complete(self, migration: str) -> None:
        """Do not wait any longer: freeze the guest now.

        With post-copy where the options of the migration permit it.

        :raises ContainerError: ``not_found``
        """
        with self._lock:
            job = self._sources.get(migration)
        if job is None:
            raise errors.ContainerError(
                'not_found', f'no migration {migration} leaves this host')
        job.force_complete()

    def abort(self, migration: str, reason: str) -> None:
        """End a migration before its commit, and wait for the end.

        :raises ContainerError: ``bad_state``: it has committed;
            ``not_found``
        """
        with self._lock:
            job = (self._sources.get(migration) or
                   self._destinations.get(migration))
        if job is None:
            raise errors.ContainerError(
                'not_found', f'there is no migration {migration} here')
        job.abort(reason)
        with self._changed:
            self._changed.wait_for(
                lambda: migration in self._ended, _END_TIMEOUT)
