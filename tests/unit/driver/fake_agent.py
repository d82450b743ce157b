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

"""An agent in memory, for tests of what calls one.

It has the methods of nova_pycontainer.agent.client.Client and keeps to the
runtime's rules about states; a test that drives it into a wrong one fails as
it would with the real agent.
"""

import hashlib
import io
import tarfile
import threading
import time

from nova_pycontainer.agent import client
from nova_pycontainer.runtime import errors
from tests.unit.driver import fake_migration

GIB = 1 << 30


def _error(code, message, **kwargs):
    return errors.ContainerError(code, message, **kwargs)


class FakeAgent(fake_migration.Migrations):
    """One host's agent.

    :ivar down: the agent does not answer
    :ivar failures: verb → exception, raised in place of doing it
    :ivar calls: verbs in the order in which they were called
    """

    def __init__(self):
        super().__init__()
        self.down = False
        self.failures = {}
        self.calls = []
        self.cpu_flags = []
        self.numa = [{
            'id': 0, 'cpus': [*range(8)], 'memory_bytes': 16 * GIB,
            'socket': 0, 'cores': [[cpu] for cpu in range(8)]}]
        self.layers = {}
        self.imports = 0
        self.containers = {}
        self.links = {}
        self.stubborn = set()
        self._events = []
        self._changed = threading.Condition()
        self._lock = threading.RLock()
        self._ids = 0x40000000

    def _enter(self, verb):
        self.calls.append(verb)
        if self.down:
            raise errors.AgentUnavailable(
                'agent_unavailable',
                'the pycontainer agent at /fake/agent.sock does not answer',
                remedy='Start pycontainer-agent on this host')
        if verb in self.failures:
            raise self.failures[verb]

    def _get(self, uuid, *states):
        item = self.containers.get(uuid)
        if item is None:
            raise _error('not_found',
                         f'there is no container of instance {uuid} on this '
                         'host', uuid=uuid)
        if states and item['state'] not in states:
            raise _error('bad_state', f'the container is {item["state"]}',
                         uuid=uuid)
        return item

    def _event(self, kind, uuid, ended=None):
        with self._changed:
            self._events.append({
                'seq': len(self._events) + 1000, 'type': kind, 'uuid': uuid,
                'at': time.time(), 'exit': ended})
            self._changed.notify_all()

    # Host

    def host_info(self):
        self._enter('host_info')
        return {
            'hostname': 'fake', 'architecture': 'x86_64', 'kernel': '6.1',
            'cpus': 8, 'numa': self.numa, 'cpu_flags': self.cpu_flags,
            'memory_bytes': 16 * GIB,
            'memory_available_bytes': 12 * GIB,
            'disk_total_bytes': 100 * GIB, 'disk_free_bytes': 60 * GIB,
            'uptime_s': 100.0, 'containers': len(self.containers),
            'oci_runtime': {'name': 'crun', 'version': '1.8'},
            'cgroup': {'mode': 'unified', 'missing': []},
            'disk_limit': 'project', 'migration': self.identity()}

    def list(self):
        self._enter('list')
        return [dict(item) for item in self.containers.values()]

    def info(self, uuid):
        self._enter('info')
        item = self._get(uuid)
        # The config drive is not read back.
        return {'migration': None, **item, 'spec': {
            key: value for key, value in item['spec'].items()
            if key not in ('config_drive', 'files')}}

    find = client.Client.find

    # Layers

    def layer_present(self, key):
        self._enter('layer_present')
        return key in self.layers

    def layer_list(self):
        self._enter('layer_list')
        return [{'key': key, **layer} for key, layer in self.layers.items()]

    def layer_import(self, key, stream, *, image, max_bytes=None,
                     digest=None):
        self._enter('layer_import')
        data = b''.join(stream)
        algorithm, _, value = (digest or 'sha256:').partition(':')
        found = hashlib.new(algorithm, data).hexdigest()
        if value and found != value:
            raise _error('image_truncated',
                         'the data do not match the hash')
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                members = archive.getmembers()
        except tarfile.TarError as e:
            raise _error(
                'image_not_archive', f'image {image} is not an archive',
                cause=str(e), remedy='Upload a tar archive of the root '
                'file system') from e
        for member in members:
            if '..' in member.name.split('/'):
                raise _error(
                    'image_unsafe_entry',
                    f'entry {member.name!r} leaves the root directory',
                    remedy='Build the image again without it')
        size = sum(m.size for m in members)
        if max_bytes is not None and size > max_bytes:
            raise _error('image_too_large', 'the image is too large')
        self.layers[key] = {'image': image, 'bytes': size,
                            'digest': f'{algorithm}-{found}'}
        self.imports += 1
        return {'key': key, **self.layers[key]}

    # Network

    def plug(self, uuid, nics):
        self._enter('plug')
        for nic in nics:
            self.links.setdefault(nic['devname'], uuid)

    def unplug(self, uuid, devnames):
        self._enter('unplug')
        for name in devnames:
            self.links.pop(name, None)

    # Life

    def define(self, uuid, spec, layer_later=False):
        self._enter('define')
        if uuid in self.containers:
            raise _error('exists', 'this host has it already', uuid=uuid)
        if spec['layer'] not in self.layers and not (
                layer_later or spec.get('root')):
            raise _error('layer_missing', 'the layer is not on this host',
                         uuid=uuid)
        with self._lock:
            self._ids += 65536
            base_id = spec['base_id'] or self._ids
        self.containers[uuid] = {
            'uuid': uuid, 'name': spec['name'], 'state': 'defined',
            'base_id': base_id, 'image_id': spec['image_id'],
            'nics': spec['nics'],
            'resources': dict(spec['resources']), 'spec': spec,
            'exit': None, 'moved': None, 'root': spec.get('root'),
            'offered': None, 'incoming': None, 'arrived': None,
            'volumes': [{**volume, 'statistics': None}
                        for volume in spec.get('volumes', ())],
            'console': b'', 'rescue': None,
            'layer': spec['layer'], 'memory_bytes': 64 << 20,
            'disk': {'used_bytes': 1 << 20, 'method': 'loop'}}
        return dict(self.containers[uuid])

    def prepare(self, uuid, changes=None):
        self._enter('prepare')
        item = self._get(uuid, 'defined', 'stopped')
        item['spec'] = {**item['spec'], **(changes or {})}
        item['nics'] = item['spec']['nics']
        item['volumes'] = [{**volume, 'statistics': None}
                           for volume in item['spec'].get('volumes', ())]
        for nic in item['nics']:
            self.links.setdefault(nic['devname'], uuid)
        item['state'] = 'created'
        return dict(item)

    def transfer_offer(self, uuid, migration, destination, options=None):
        self._enter('transfer_offer')
        item = self._get(uuid, 'defined', 'stopped')
        item['offered'] = migration
        self.facts = {
            'source': {}, 'spec': item['spec'], 'to': destination,
            'base_id': item['base_id'], 'layer': {}, 'drive': False}
        return self.facts

    def transfer_describe(self, uuid, migration, source_host):
        self._enter('transfer_describe')
        return self.facts

    def transfer_take(self, uuid, migration, spec, facts, options=None):
        self._enter('transfer_take')
        self.define(uuid, {**spec, 'base_id': facts['base_id']})
        return self._taken(uuid, migration)

    def transfer_resume(self, uuid):
        self._enter('transfer_resume')
        return self._taken(uuid, self._get(uuid)['incoming'])

    def _taken(self, uuid, migration):
        self._get(uuid).update(incoming=None, arrived=migration)
        self._progress[migration] = {
            'phase': 'completed', 'migration': migration}
        return self._progress[migration]

    def transfer_withdraw(self, uuid):
        self._enter('transfer_withdraw')
        self._get(uuid)['offered'] = None
        return self.info(uuid)

    def start_container(self, uuid):
        self._enter('start_container')
        item = self._get(uuid, 'created')
        item['state'] = 'running'
        item['console'] += b'Start-up done\n'
        self._event('started', uuid)
        return dict(item)

    def stop(self, uuid, timeout_s):
        self._enter('stop')
        item = self._get(uuid)
        if item['state'] in ('created', 'running', 'paused'):
            clean = timeout_s > 0 and uuid not in self.stubborn
            self._end(item, None if clean else 9)
        elif item['state'] == 'suspended':
            item['state'] = 'stopped'
        return item['exit']

    def pause(self, uuid):
        self._enter('pause')
        item = self._get(uuid, 'running', 'paused')
        item['state'] = 'paused'
        self._event('paused', uuid)
        return dict(item)

    def unpause(self, uuid):
        self._enter('unpause')
        item = self._get(uuid, 'running', 'paused')
        item['state'] = 'running'
        self._event('unpaused', uuid)
        return dict(item)

    def console_token(self, uuid):
        self._enter('console_token')
        self._get(uuid, 'created', 'running', 'paused')
        return {'port': 6084, 'path': f'/secret-{uuid}'}

    def interface_attach(self, uuid, nic):
        self._enter('interface_attach')
        item = self._get(uuid)
        item['nics'] = [*item['nics'], nic]
        return dict(item)

    def interface_detach(self, uuid, devname):
        self._enter('interface_detach')
        item = self._get(uuid)
        item['nics'] = [
            nic for nic in item['nics'] if nic['devname'] != devname]
        self.links.pop(devname, None)
        return dict(item)

    def volume_attach(self, uuid, volume):
        self._enter('volume_attach')
        item = self._get(uuid)
        item['volumes'] = [*item['volumes'], {**volume, 'statistics': None}]
        return dict(item)

    def volume_detach(self, uuid, volume):
        self._enter('volume_detach')
        item = self._get(uuid)
        item['volumes'] = [v for v in item['volumes'] if v['id'] != volume]
        return dict(item)

    def suspend(self, uuid):
        self._enter('suspend')
        item = self._get(uuid, 'running')
        item['state'] = 'suspended'
        self._event('suspended', uuid)
        return dict(item)

    def resume(self, uuid, changes=None):
        self._enter('resume')
        item = self._get(uuid, 'suspended')
        item['state'] = 'running'
        self._event('resumed', uuid)
        return dict(item)

    def delete(self, uuid, keep_disk=False):
        self._enter('delete')
        item = self.containers.get(uuid)
        if item is None:
            return
        self.abort_of(uuid)
        if item['state'] in ('created', 'running', 'paused'):
            self._end(item, 9)
        if not keep_disk:
            self.containers.pop(uuid, None)

    def _end(self, item, signal):
        started = item['state'] != 'created'
        item['state'] = 'stopped'
        item['exit'] = {'code': None if signal else 0, 'signal': signal}
        for nic in item['nics']:
            self.links.pop(nic['devname'], None)
        if started:
            self._event('stopped', item['uuid'], item['exit'])

    def snapshot(self, uuid):
        self._enter('snapshot')
        self._get(uuid)
        return io.BytesIO(b'a root file system')

    def rescue(self, uuid, spec):
        self._enter('rescue')
        item = self._get(uuid, 'defined', 'stopped')
        if spec['layer'] not in self.layers:
            raise _error('layer_missing', 'the layer is not on this host',
                         uuid=uuid)
        item.update(rescue=spec, image_id=spec['image_id'])
        return dict(item)

    def unrescue(self, uuid):
        self._enter('unrescue')
        item = self._get(uuid)
        if item['state'] in ('created', 'running', 'paused'):
            self._end(item, 9)
        item.update(rescue=None, image_id=item['spec']['image_id'])
        return dict(item)

    def console_log(self, uuid, max_bytes=102400):
        self._enter('console_log')
        return self._get(uuid)['console'][-max_bytes:]

    def events(self, after, timeout_s):
        self._enter('events')
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self.down:
                    self._enter('events')
                found = [e for e in self._events if e['seq'] > after]
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(min(left, 0.05))

    # What a guest does.

    def guest_powers_off(self, uuid):
        self._end(self._get(uuid, 'running'), None)
