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

"""Migrations between agents in memory."""

import threading
import time
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime import state

#: Phases of the real agent, in their order.
PHASES = ('prepared', 'copying', 'frozen', 'ready', 'committed', 'running',
          'completed')

_ENDED = ('completed', 'aborted', 'failed')

_PATIENCE = 30


def problem(name, reason, remedy, process=None):
    return {'name': name, 'reason': reason, 'remedy': remedy,
            'process': process}


class Migrations:
    """The verbs of migration, for FakeAgent.

    ``hold`` keeps every migration that leaves this host in a phase until
    ``proceed`` is called.

    :ivar begun: (migration, endpoint, options) of each that began here
    :ivar prepared: (migration, source, options) of each that was prepared
    """

    #: Who listens where.
    listening = {}

    def __init__(self):
        self.port = 1024 + len(self.listening)
        self.listening[self.port] = self
        self.certificate = f'certificate {uuidlib.uuid4()}'
        self.begun = []
        self.prepared = []
        self._incoming = {}
        self._progress = {}
        self._hold = None
        self._go = threading.Event()
        self._go.set()
        self.moved = threading.Condition()
        #: Error of the restore on this host.
        self.restore_error = None
        #: None: of a release that does not tell it.
        self.state_format = state.FORMAT
        #: What the checks find, see nova_pycontainer.runtime.migration.checks
        self.source_problems = []
        self.destination_problems = []
        self.warnings = []

    def identity(self):
        return {'protocol': protocol.VERSION,
                **({'state_format': self.state_format}
                   if self.state_format else {}),
                'certificate': self.certificate,
                'fingerprint': f'fingerprint of {self.certificate}',
                'address': '192.0.2.1', 'port': self.port}

    # What tests do

    def hold(self, phase):
        self._hold = phase
        self._go.clear()

    def proceed(self):
        self._hold = None
        self._go.set()

    def wait_for_phase(self, phase):
        """Wait until some migration from here is in a phase."""
        with self.moved:
            if not self.moved.wait_for(
                    lambda: any(p['phase'] == phase
                                for p in self._progress.values()),
                    _PATIENCE):
                raise AssertionError(f'no migration is {phase}: '
                                     f'{self._progress}')

    def forget_migrations(self):
        """A restart of the agent."""
        for progress in self._progress.values():
            progress['phase'] = 'aborted'
        self._progress.clear()
        self._incoming.clear()

    # Verbs

    def migration_check_source(self, uuid):
        self._enter('migration_check_source')
        item = self._get(uuid, 'running', 'paused')
        return {'facts': {key: item[key] for key in (
                    'uuid', 'layer', 'image_id', 'base_id')},
                'problems': self.source_problems, 'warnings': self.warnings}

    def migration_check_destination(self, facts):
        self._enter('migration_check_destination')
        problems = [*self.destination_problems]
        for item in self.containers.values():
            if item['uuid'] == facts['uuid']:
                problems.append(problem(
                    'exists', 'this host has a container of it already',
                    'Delete it there first'))
            elif item['base_id'] == facts['base_id']:
                problems.append(problem(
                    'id-range', f'its host ids belong to {item["uuid"]}',
                    'Give the hosts disjoint ranges'))
        return {'facts': {'layer_present': facts['layer'] in self.layers},
                'problems': problems, 'warnings': self.warnings}

    def migration_prepare(self, uuid, migration, spec, source, options=None):
        self._enter('migration_prepare')
        self.define(uuid, spec, layer_later=True)
        for nic in spec['nics']:
            self.links.setdefault(nic['devname'], uuid)
        self.prepared.append((migration, source, options))
        self._incoming[migration] = uuid
        self._new(migration, uuid, 'destination')
        return self.identity()

    def _new(self, migration, uuid, role):
        self._progress[migration] = {
            'migration': migration, 'uuid': uuid, 'role': role,
            'phase': 'prepared', 'strategy': 'stop-and-copy', 'error': None,
            'memory_total': 0, 'memory_sent': 0, 'disk_sent': 0,
            'layer_total': 0, 'layer_sent': 0,
            'ended_at': None}

    def migration_begin(self, uuid, migration, destination, options=None):
        self._enter('migration_begin')
        self._get(uuid, 'running', 'paused')
        self.begun.append((migration, destination, options))
        self._new(migration, uuid, 'source')
        begun = dict(self._progress[migration])
        threading.Thread(
            target=self._migrate, args=(uuid, migration, destination),
            daemon=True).start()
        return begun

    def _phase(self, migration, phase, **values):
        with self.moved:
            progress = self._progress.get(migration)
            if progress is None or progress['phase'] in _ENDED:
                return False
            progress.update(values, phase=phase)
            if phase in _ENDED:
                progress['ended_at'] = time.time()
            self.moved.notify_all()
        return True

    def _migrate(self, uuid, migration, destination):
        peer = self.listening[destination['port']]
        progress = self._progress[migration]
        if destination['certificate'] != peer.certificate:
            self._fail(migration, None, errors.ContainerError(
                'network', 'the other host has another certificate'))
            return
        item = self.containers[uuid]
        if item['layer'] not in peer.layers:
            peer.layers[item['layer']] = self.layers[item['layer']]
            progress['layer_total'] = progress['layer_sent'] = 1 << 11
        for phase in PHASES[1:-1]:
            if phase == 'ready' and peer.restore_error is not None:
                self._fail(migration, peer, peer.restore_error)
                return
            if not self._phase(migration, phase, memory_sent=1 << 20,
                               disk_sent=1 << 10):
                peer.drop_incoming(migration)
                return
            if phase == self._hold:
                while not self._go.wait(0.02):
                    if progress['phase'] in _ENDED:
                        break
        peer.receive(migration, item)
        item['state'], item['moved'] = 'stopped', True
        for nic in item['nics']:
            self.links.pop(nic['devname'], None)
        self._phase(migration, 'completed')

    def abort_of(self, uuid):
        """The container is deleted."""
        for migration, progress in [*self._progress.items()]:
            if progress['uuid'] == uuid and progress['phase'] not in (
                    'committed', 'running', *_ENDED):
                self.migration_abort(migration, 'the instance is deleted')

    def _fail(self, migration, peer, error):
        if peer is not None:
            peer.drop_incoming(migration)
        self._phase(migration, 'failed', error=error.to_dict())

    def receive(self, migration, item):
        mine = self.containers[self._incoming.pop(migration)]
        mine['state'] = item['state']
        mine['console'] = item['console']
        self._phase(migration, 'completed')
        self._event('started', mine['uuid'])

    def drop_incoming(self, migration):
        uuid = self._incoming.pop(migration, None)
        if uuid is not None:
            self.containers.pop(uuid, None)
            self._phase(migration, 'failed')

    def _known(self, migration):
        if migration not in self._progress:
            raise errors.ContainerError(
                'not_found', f'there is no migration {migration} here')
        return self._progress[migration]

    def migration_status(self, migration, wait_s=0.0):
        self._enter('migration_status')
        progress = self._known(migration)
        with self.moved:
            self.moved.wait_for(lambda: progress['phase'] in _ENDED, wait_s)
            return dict(self._known(migration))

    def migration_abort(self, migration, reason):
        self._enter('migration_abort')
        progress = self._known(migration)
        if progress['phase'] in ('committed', 'running', 'completed'):
            raise errors.ContainerError(
                'bad_state', 'the instance runs on the destination already',
                uuid=progress['uuid'])
        self._phase(migration, 'aborted', error={
            'code': 'aborted', 'message': 'the migration was aborted',
            'cause': reason})
        if progress['role'] == 'destination':
            self.drop_incoming(migration)

    def migration_force_complete(self, migration):
        self._enter('migration_force_complete')
        self._known(migration)
        self.proceed()
