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

"""The verbs of cold migration.

A container that was offered to another host is not started here any more,
and stays as it is until it is withdrawn or deleted: whether the other host's
is the one, the caller knows. What is taken is not started before all of it
has come; what has come of one that failed stays until it is taken again, or
deleted. ``state.json`` says both, so that no restart of the agent forgets it.
"""

import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import cold
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import question
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime.migration import source
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer.runtime import rescue

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 20.0

Info = dict[str, ty.Any]


def _number() -> int:
    """The first of 64 for connections, never used twice, over restarts too.
    """
    return int(time.time() * 1000) % (1 << 24) << 6


class Transfers:
    """The offers of one host, and what it takes."""

    def __init__(self, owner: 'host.Host') -> None:
        self._host = owner
        self._lock = threading.Lock()
        self._offers: dict[str, cold.Offer] = {}

    def recover(self) -> None:
        """Go on with the offers of before."""
        for entry in self._host.entries():
            item = entry.container
            if not item.st.offered:
                continue
            try:
                self._open(item, self._facts(item))
            except (OSError, errors.ContainerError) as e:
                # One container must not keep the others from their agent.
                LOG.error('instance %s cannot be offered any more: %s',
                          item.uuid, e)
            except Exception:
                LOG.exception('instance %s cannot be offered any more',
                              item.uuid)

    # Source

    def offer(self, uuid: str, migration: str, destination: Info,
              options: Info | None = None) -> Info:
        """Let one other host read a container that is down.

        :param destination: that host, as its ``host_info`` says
        :returns: what it needs: ``source``, ``spec``, ``base_id``, ``layer``,
            ``drive``
        :raises ContainerError: ``bad_state``
        """
        rconfig.check_uuid(migration)
        versions.check(destination, 'destination')
        opts = protocol.Options.from_dict(options or {})
        # Before it is written down, and read at each start.
        question.peer(destination).pin()
        with self._host.locked(uuid) as entry:
            item = entry.container
            entry.require('defined', 'stopped')
            item.check_here()
            entry.check_stays()
            self._host.snapshots.check_movable(uuid)
            rescue.check_not(item)
            facts = self._facts(item)
            self.end(uuid)
            item.st.offered = {
                'migration': migration, 'peer': destination,
                'bandwidth': opts.bandwidth}
            item.st.save(item.directory)
            self._open(item, facts)
            return facts | {'source': self._host.migrations.identity()}

    def _facts(self, item: container.Container) -> Info:
        return {
            'spec': item.st.spec,
            'base_id': item.st.base_id,
            # None, if its root is a volume.
            'layer': (self._host.layers.require(item.spec.layer).to_dict()
                      if item.spec.layer else {}),
            'drive': item.config_drive.exists()}

    def _open(self, item: container.Container, facts: Info) -> None:
        assert item.st.offered is not None
        migration = str(item.st.offered['migration'])
        offer = cold.Offer(
            item, self._host.layers, facts,
            protocol.Progress(migration, item.uuid, 'source'),
            item.st.offered.get('bandwidth'))
        with self._lock:
            self._offers[item.uuid] = offer
        self._host.migrations.expect(
            migration, item.uuid, item.st.offered['peer'], offer, cold.ROLES)

    def withdraw(self, uuid: str) -> Info:
        """Have it here again; idempotent."""
        self.end(uuid)
        with self._host.locked(uuid) as entry:
            item = entry.container
            if item.st.offered is not None:
                item.st.offered = None
                item.st.save(item.directory)
            return item.info()

    def end(self, uuid: str) -> None:
        """Let nobody read it any more; idempotent."""
        with self._lock:
            offer = self._offers.pop(uuid, None)
        if offer is not None:
            self._host.migrations.forget(offer.progress.migration)
            offer.abort('the offer was withdrawn')

    # Destination

    def describe(self, uuid: str, migration: str, source_host: Info) -> Info:
        """What :meth:`offer` has returned on another host, which is asked.

        :param source_host: that host, as its ``host_info`` says
        :raises ContainerError: it cannot be reached, or does not offer it
        """
        rconfig.check_uuid(migration)
        rconfig.check_uuid(uuid)
        versions.check(source_host, 'source')
        return cold.ask(self._host.migrations.connect(
            source.Endpoint.from_dict(source_host),
            channel.Hello(migration, uuid, 'facts', _number()),
            _CONNECT_TIMEOUT)) | {'source': source_host}

    def take(self, uuid: str, migration: str, spec: Info, facts: Info,
             options: Info | None = None) -> Info:
        """Start to copy a container of another host; it is down after that.

        :param spec: as for :meth:`.host.Host.define`
        :param facts: what :meth:`offer` has returned there
        :returns: progress; :meth:`.migrations.Migrations.status` has more.
            What has come of one that fails is not started; to call this
            again goes on with it
        """
        rconfig.check_uuid(migration)
        versions.check(facts['source'], 'source')
        opts = protocol.Options.from_dict(options or {})
        endpoint = source.Endpoint.from_dict(facts['source'])
        entry = self._incoming(uuid, spec, {
            'migration': migration, 'facts': facts, 'options': options})
        first = _number()

        def connect(role: str, seq: int) -> channel.Connection:
            return self._host.migrations.connect(
                endpoint, channel.Hello(migration, uuid, role, first + seq),
                _CONNECT_TIMEOUT)

        progress = protocol.Progress(migration, uuid, 'destination')
        taking = cold.Taking(
            entry.container, self._host.layers, connect, facts['layer'],
            bool(facts.get('drive')), progress, opts.bandwidth)
        entry.migration = taking
        self._host.migrations.add(migration, taking)
        threading.Thread(
            target=self._run, args=(uuid, taking),
            name=f'taking-{uuid[:8]}', daemon=True).start()
        return progress.to_dict()

    def resume(self, uuid: str) -> Info:
        """Go on with :meth:`take` after it has failed.

        :raises ContainerError: ``bad_state``: nothing of it is missing
        """
        item = self._host.entry(uuid).container
        mark = item.st.incoming
        if mark is None:
            raise errors.ContainerError(
                'bad_state', 'all of the instance has come', uuid=uuid)
        return self.take(uuid, str(mark['migration']), item.st.spec,
                         mark['facts'], mark['options'])

    def _incoming(self, uuid: str, spec: Info, mark: Info) -> 'host.Entry':
        """The container that it becomes: a new one, or what an earlier try
        has left.
        """
        try:
            entry = self._host.entry(uuid)
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            with room.needed('the disk and the description of the guest'):
                self._host.define(
                    uuid, {**spec, 'base_id': mark['facts']['base_id']},
                    layer_later=True, incoming=mark)
            return self._host.entry(uuid)
        with entry.lock:
            entry.check_stays()
            # What comes is its own, and not the other root's.
            rescue.check_not(entry.container)
            if (entry.container.st.incoming or {}).get('migration') != (
                    mark['migration']):
                raise errors.ContainerError(
                    'exists', 'this host has a container of it already',
                    uuid=uuid, remedy='Delete it first')
        return entry

    def _run(self, uuid: str, taking: cold.Taking) -> None:
        progress = taking.progress
        entry = self._host.entry(uuid)
        phase = protocol.Phase.FAILED
        try:
            # Who wants to do something with it waits for the end.
            with entry.lock:
                taking.run()
                item = entry.container
                assert item.st.incoming is not None
                item.st.arrived = {
                    'migration': progress.migration,
                    'peer': item.st.incoming['facts']['source'],
                    # Nobody asks: the source runs nothing.
                    'at': 0}
                item.st.incoming = None
                item.st.save(item.directory)
            phase = protocol.Phase.COMPLETED
        except BaseException as e:
            if not isinstance(e, errors.ContainerError):
                LOG.exception('instance %s: it cannot be taken', uuid)
            error = errors.ContainerError.of(e, 'the migration failed', uuid)
            LOG.warning('instance %s: %s', uuid, error)
            progress.error = error.to_dict()
            if error.code == 'aborted':
                phase = protocol.Phase.ABORTED
        finally:
            entry.migration = None
            progress.phase = phase
            self._host.migrations.ended(progress)
