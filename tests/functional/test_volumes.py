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

"""Volumes through Nova: real block devices, by os-brick's local connector.

Cinder is Nova's fixture: it says which device a volume is on every host, as a
driver for storage that all hosts share would.
"""

import pathlib
import tempfile

import fixtures
from nova import context
from nova import objects
from nova.tests.fixtures import cinder
from nova.tests.fixtures import os_brick
from os_brick import privileged
from oslo_utils import uuidutils

from nova_pycontainer import attachments
from tests import cases
from tests.functional import agents
from tests.functional import migration_base
from tests.functional import test_snapshots
from tests import loop


class TestCase(test_snapshots.TestCase, migration_base.TestCase):

    def setUp(self):
        super().setUp()
        self.cinder = self.useFixture(cinder.CinderFixture(self))
        # These tests are root themselves.
        privileged.default.set_client_mode(False)
        self.addCleanup(privileged.default.set_client_mode, True)
        # Nova's tests may not look at this machine's adapters; they know what
        # a host could have.
        self.useFixture(fixtures.MonkeyPatch(
            'os_brick.initiator.connector.get_connector_properties',
            os_brick.get_connector_properties))
        self.known = dict(cinder.CinderFixture.VOLUME_CONNECTION_INFO)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.cinder.CinderFixture.'
            'VOLUME_CONNECTION_INFO', self.known))
        self.top = tempfile.TemporaryDirectory(
            prefix='pyc-volumes-', dir=agents.WORK)
        self.addCleanup(self.top.cleanup)

    def volume(self, ident=None, size=16 * loop.MIB, **data):
        """The id of a volume, and the device that it is on all hosts."""
        ident = ident or uuidutils.generate_uuid()
        device = loop.Loop(pathlib.Path(self.top.name, ident), size)
        self.addCleanup(device.close)
        self.known[ident] = {
            'driver_volume_type': 'local',
            'data': {'device_path': device.path, **data}}
        return ident, device

    def attach(self, server, ident, **values):
        self.api.post_server_volume(server['id'], {
            'volumeAttachment': {'volumeId': ident, **values}})
        self.wait_for(lambda: ident in self.had(server), 'the volume')

    def at_home(self, server):
        # Nova asks nova.conf, which all services share here, whether a
        # server is its own before it has a volume detached.
        self.flags(host=self.host(server))

    def detach(self, server, ident):
        self.at_home(server)
        self.api.delete_server_volume(server['id'], ident)
        self.wait_for(lambda: ident not in self.attached(server),
                      'the end of the volume')

    def attached(self, server):
        return [found['volumeId'] for found in
                self.api.get_server_volumes(server['id'])]

    def had(self, server, host=None):
        """What the agent knows: id → name."""
        return {v['id']: v['name'] for v in self.info(
            server, host or self.host(server))['volumes']}

    def write(self, server, text, name='vdb'):
        self.sh(server, f'printf %s "{text}" | dd of=/dev/{name} '
                'conv=notrunc,fsync', self.host(server))

    def hold(self, server):
        """Have a process with the device open; /run/holder says which."""
        self.sh(server, 'setsid sh -c "exec 3</dev/vdb; '
                'echo \\$\\$ > /run/holder; exec sleep 1000" '
                '</dev/null >/dev/null 2>&1 & '
                'while [ ! -s /run/holder ]; do sleep 0.05; done')

    def assert_reads(self, server, text):
        self.assertEqual(text, self.sh(
            server, f'dd if=/dev/vdb bs={len(text)} count=1 2>/dev/null',
            self.host(server)))

    def assert_wrote(self, server, device, text, name='vdb'):
        self.write(server, text, name)
        self.assertEqual(text.encode(), device.read(len(text)))


class VolumesTest(TestCase):

    def test_attach_and_detach(self):
        server = self.boot()
        (one, device), (two, other) = self.volume(), self.volume()
        self.attach(server, one)
        self.attach(server, two, tag='second')
        self.assertEqual({one: 'vdb', two: 'vdc'}, self.had(server))
        self.assert_wrote(server, device, 'first')
        self.assert_wrote(server, other, 'second', 'vdc')
        [found] = self.instance(server).device_metadata.devices
        self.assertEqual((['second'], two, '/dev/vdc'), (
            found.tags, found.serial, found.path))
        usage = self.computes['host1'].driver.get_all_volume_usage(None, [{
            'instance': self.instance(server),
            'instance_bdms': [{'volume_id': one}]}])
        self.assertGreater(usage[0]['wr_bytes'], 0)
        self.detach(server, one)
        self.assertEqual({two: 'vdc'}, self.had(server))
        self.assertEqual([], self.sh(
            server, 'ls /dev | grep vdb || :').split())
        self.delete(server)
        self.assert_nothing_left()

    def test_in_use(self):
        """It stays attached, as Cinder says, until the guest lets it go."""
        server = self.boot()
        ident, device = self.volume()
        self.attach(server, ident)
        self.hold(server)
        self.at_home(server)
        self.api.delete_server_volume(server['id'], ident)
        self.wait_for(lambda: 'is open in the guest' in self.reason(server),
                      'the refusal')
        self.assertEqual([ident], self.attached(server))
        self.assert_wrote(server, device, 'still')
        self.sh(server, 'kill $(cat /run/holder)')
        self.detach(server, ident)
        self.assertEqual({}, self.had(server))

    def test_extend(self):
        server = self.boot()
        ident, device = self.volume()
        self.attach(server, ident)
        device.grow(32 << 20)
        self.api.create_server_external_events(events=[{
            'name': 'volume-extended', 'server_uuid': server['id'],
            'tag': ident}])
        self.assertEqual(str(32 << 20), self.sh(
            server, 'blockdev --getsize64 /dev/vdb'))
        self.wait_for(
            lambda: [a for a in self.api.get_instance_actions(server['id'])
                     if a['action'] == 'extend_volume'], 'the event')
        self.assertEqual('', self.reason(server))

    def test_from_the_start_and_through_its_life(self):
        ident, device = self.volume()
        server = self.boot(block_device_mapping_v2=[
            {'boot_index': 0, 'uuid': self.image, 'source_type': 'image',
             'destination_type': 'local'},
            {'boot_index': -1, 'uuid': ident, 'source_type': 'volume',
             'destination_type': 'volume', 'tag': 'data'}])
        self.assertEqual({ident: 'vdb'}, self.had(server))
        self.assert_wrote(server, device, 'booted')
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        self.assert_wrote(server, device, 'started')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_wrote(server, device, 'rebooted')
        self.action(server, 'SUSPENDED', 'suspend')
        self.action(server, 'ACTIVE', 'resume')
        self.assert_wrote(server, device, 'resumed')
        self.action(server, 'PAUSED', 'pause')
        self.action(server, 'ACTIVE', 'unpause')
        self.action(server, 'RESCUE', 'rescue', {})
        self.assert_wrote(server, device, 'rescued')
        self.action(server, 'ACTIVE', 'unrescue')
        self.assert_wrote(server, device, 'unrescued')
        self.action(server, 'ACTIVE', 'rebuild', {'imageRef': self.image})
        self.assert_wrote(server, device, 'rebuilt')
        self.action(server, 'SHELVED_OFFLOADED', 'shelve')
        self.action(server, 'ACTIVE', 'unshelve')
        self.assert_wrote(server, device, 'unshelved')
        self.delete(server)
        for host in ('host1', 'host2'):
            self.assert_nothing_left(host)

    def swap(self, server, old, new):
        """As Cinder has it done for a volume that it migrates."""
        self.api.put_server_volume(server['id'], old, new)

    @staticmethod
    def saved(server, ident):
        return objects.BlockDeviceMapping.get_by_volume_and_instance(
            context.get_admin_context(), ident, server['id']).connection_info

    def test_swap(self):
        ids = cinder.CinderFixture
        one, device = self.volume(ids.SWAP_OLD_VOL)
        two, other = self.volume(ids.SWAP_NEW_VOL)
        server = self.boot()
        self.attach(server, one)
        self.write(server, 'before')
        # Nobody takes it away from a process.
        self.hold(server)
        self.swap(server, one, two)
        self.wait_for(lambda: 'is open in the guest' in self.reason(server),
                      'the refusal')
        self.assertEqual([one], self.attached(server))
        self.assert_wrote(server, device, 'beside')
        self.sh(server, 'kill $(cat /run/holder)')
        self.swap(server, one, two)
        self.wait_for(lambda: self.attached(server) == [two], 'the swap')
        self.assert_reads(server, 'beside')
        self.assert_wrote(server, other, 'after')
        self.assertEqual(b'beside', device.read(6))
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_wrote(server, other, 'rebooted')
        self.detach(server, two)
        self.assertEqual({}, self.had(server))
        self.delete(server)
        self.assert_nothing_left()

    def test_swap_of_one_that_keeps_its_name(self):
        ids = cinder.CinderFixture
        one, device = self.volume(ids.MULTIATTACH_RO_MIGRATE_OLD_VOL)
        two, other = self.volume(ids.MULTIATTACH_RO_MIGRATE_NEW_VOL)
        server = self.boot()
        self.attach(server, one)
        self.write(server, 'before')
        self.swap(server, one, two)
        self.wait_for(lambda: self.info(server)['volumes'][0]['path'] ==
                      other.path, 'the swap')
        self.assertEqual({one: 'vdb'}, self.had(server))
        self.assert_reads(server, 'before')
        self.wait_for(
            lambda: other.path in self.saved(server, one), 'its record')
        self.known[one] = self.known[two]
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_wrote(server, other, 'there')
        self.detach(server, one)
        self.assertEqual({}, self.had(server))

    def test_multiattach(self):
        ident, device = self.volume(cinder.CinderFixture.MULTIATTACH_VOL)
        one, two = self.boot(), self.boot()
        self.attach(one, ident)
        self.attach(two, ident)
        self.assert_wrote(one, device, 'of both')
        self.assert_reads(two, 'of both')
        self.detach(one, ident)
        self.assert_wrote(two, device, 'of one')

    def test_live_migration(self):
        server = self.boot()
        (one, device), (two, other) = self.volume(), self.volume()
        self.attach(server, one)
        self.attach(server, two)
        for host in ('host2', 'host1'):
            self.migrate(server, host)
            self.wait_for_migration(server, 'completed')
            self.assertEqual(host, self.host(server))
            self.assertEqual({one: 'vdb', two: 'vdc'}, self.had(server))
            self.assert_wrote(server, device, f'at {host}')
            self.assert_wrote(server, other, f'also {host}', 'vdc')
        self.detach(server, one)
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assertEqual({two: 'vdc'}, self.had(server))
        self.delete(server)

    def restarted(self, status, **faults):
        """A server that migrated while the source's nova-compute restarted.

        :returns: it, its volume and device, and the attachment that it had
        """
        server = self.boot()
        ident, device = self.volume()
        self.attach(server, ident)
        [before] = self.cinder.volume_to_attachment[ident]
        self.restart_agent('host1', PYCONTAINER_FAULTS='source.pass=sleep:8')
        if faults:
            self.restart_agent('host2', **faults)
        self.migrate(server)
        self.wait_for(
            lambda: getattr(self.record(server), 'status', '') == 'running',
            'the migration')
        self.lose('host1')
        self.assertEqual(2, len(self.cinder.volume_to_attachment[ident]))
        self.restart('host1')
        self.wait_for_migration(server, status)
        return server, ident, device, before

    def test_nova_compute_restarts_while_it_migrates(self):
        server, ident, device, before = self.restarted('completed')
        self.assertEqual('host2', self.host(server))
        [now] = self.cinder.volume_to_attachment[ident]
        self.assertNotEqual(before, now)
        self.assert_wrote(server, device, 'there')
        self.assertFalse(attachments.forget(self.instance(server, 'host2')))
        self.detach(server, ident)
        self.assertEqual({}, self.cinder.volume_to_attachment[ident])

    @cases.more
    def test_nova_compute_of_the_destination_is_away(self):
        server = self.boot()
        ident, device = self.volume()
        self.attach(server, ident)
        asked = self.lose_the_end(False)
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assertEqual(['host1', 'host1'], asked)
        self.assertEqual('host2', self.host(server))
        self.assertEqual(1, len(self.cinder.volume_to_attachment[ident]))
        self.assert_wrote(server, device, 'there')
        self.detach(server, ident)
        self.assertEqual({}, self.cinder.volume_to_attachment[ident])

    @cases.more
    def test_nova_compute_restarts_and_it_has_failed(self):
        server, ident, device, before = self.restarted(
            'failed', PYCONTAINER_FAULTS='destination.restored=raise')
        self.assertEqual('host1', self.host(server))
        self.assertEqual(
            [before], [*self.cinder.volume_to_attachment[ident]])
        self.assert_wrote(server, device, 'here')
        self.assertFalse(attachments.forget(self.instance(server)))
        self.detach(server, ident)
        self.assertEqual({}, self.cinder.volume_to_attachment[ident])

    def test_live_migration_rolled_back(self):
        """A process has it open: the volume stays where it is."""
        server = self.boot()
        ident, device = self.volume()
        self.attach(server, ident)
        self.hold(server)
        self.migrate(server)
        self.wait_for_migration(server, 'error', 'failed')
        self.assertIn('/dev/vdb', self.reason(server))
        self.assertEqual('host1', self.host(server))
        self.assert_wrote(server, device, 'here')

    def test_cold_migration(self):
        server = self.boot()
        ident, device = self.volume()
        self.attach(server, ident)
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.assertEqual({ident: 'vdb'}, self.had(server, 'host2'))
        self.assert_wrote(server, device, 'there')
        self.action(server, 'ACTIVE', 'revertResize')
        self.assert_wrote(server, device, 'back')
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.api.post_server_action(server['id'], {'confirmResize': None})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'the end')
        self.assert_wrote(server, device, 'stays')
        self.delete(server)
        for host in ('host1', 'host2'):
            self.assert_nothing_left(host)
