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

"""Volumes, with os-brick's connector for devices that are here anyway."""

import fixtures
from nova import exception
from nova import objects
from os_brick import exception as brick_exception
from os_brick.initiator.connectors import local
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer.runtime import errors
from tests.unit.driver import driver_base


class Mapping(dict):
    """As nova.virt.block_device's."""

    def save(self):
        self['saved'] = dict(self['connection_info']['data'])


class VolumeTestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.instance.host = 'host1'
        self.connected = []
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.save', lambda instance: None))
        self.useFixture(fixtures.MonkeyPatch(
            'os_brick.initiator.connectors.local.LocalConnector.'
            'disconnect_volume', self._disconnected))
        connect = local.LocalConnector.connect_volume

        def connected(brick, data):
            self.connected.append(data['device_path'])
            return connect(brick, data)

        self.useFixture(fixtures.MonkeyPatch(
            'os_brick.initiator.connectors.local.LocalConnector.'
            'connect_volume', connected))

    def _disconnected(self, brick, data, device_info, force=False,
                      ignore_errors=False):
        self.connected = [
            path for path in self.connected if path != data['device_path']]

    def info(self, volume=uuids.volume, path='/dev/loop77', **data):
        return {'driver_volume_type': 'local', 'serial': volume,
                'data': {'device_path': path, **data}}

    def attach(self, info=None, **kwargs):
        self.driver.attach_volume(
            self.context, info or self.info(), self.instance, '/dev/vdb',
            **kwargs)

    def detach(self):
        self.driver.detach_volume(
            self.context, self.info(), self.instance, '/dev/vdb')

    def another(self):
        """Have another server with the volume; returns the one before."""
        first, self.instance = self.instance, self.make_instance(
            uuid=uuids.second)
        self.instance.host = 'host1'
        self.spawn(network_info=[])
        self.attach()
        return first

    def volumes(self):
        return [(v['id'], v['name'], v['path'], v['read_only']) for v in
                self.agent.containers[self.instance.uuid]['volumes']]

    def bdi(self, *infos):
        return {'block_device_mapping': [
            Mapping(connection_info=info, mount_device=f'/dev/vd{name}',
                    boot_index=None)
            for info, name in zip(infos, 'bcd', strict=False)]}

    def test_attach_and_detach(self):
        self.spawn()
        self.bdms = [objects.BlockDeviceMapping(
            source_type='volume', destination_type='volume',
            volume_id=uuids.volume, device_name='/dev/vdb', tag='data')]
        self.attach(self.info(access_mode='ro'))
        self.assertEqual(
            [(uuids.volume, 'vdb', '/dev/loop77', True)], self.volumes())
        [device] = self.instance.device_metadata.devices
        self.assertEqual((['data'], '/dev/vdb', uuids.volume), (
            device.tags, device.path, device.serial))
        self.detach()
        self.assertEqual([], self.volumes())
        self.assertEqual([], self.connected)

    def test_attach_fails(self):
        self.spawn()
        self.agent.failures['volume_attach'] = errors.ContainerError(
            'exists', 'the guest has a file /dev/vdb')
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertIn('the guest has a file', str(error))
        self.assertEqual([], self.connected)

    def test_what_cannot_be_connected(self):
        self.spawn()
        self.assertRaises(
            exception.VolumeDriverNotFound, self.attach,
            {'driver_volume_type': 'unheard-of', 'serial': uuids.volume,
             'data': {}})
        self.assertRaises(
            exception.VolumeEncryptionNotSupported, self.attach,
            encryption={'provider': 'luks'})
        self.assertRaises(
            exception.VolumeEncryptionNotSupported, self.attach,
            self.info(encrypted=True))

        def fail(brick, data):
            raise brick_exception.VolumeDeviceNotFound(device='iqn')

        self.useFixture(fixtures.MonkeyPatch(
            'os_brick.initiator.connectors.local.LocalConnector.'
            'connect_volume', fail))
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertIn('iqn', str(error))
        self.assertEqual([], self.volumes())

    def test_detach_of_what_is_in_use(self):
        self.spawn()
        self.attach()
        self.agent.failures['volume_detach'] = errors.ContainerError(
            'in_use', '/dev/vdb is open in the guest (dd)')
        error = self.assertRaises(exception.DeviceDetachFailed, self.detach)
        self.assertIn('(dd)', str(error))
        self.assertEqual(['/dev/loop77'], self.connected)

    def test_detach_where_the_server_is_not(self):
        """The end of a migration that did not begin."""
        self.spawn()
        self.attach()
        self.instance.host = 'host2'
        # Not as long as something here could use it.
        self.assertRaises(exception.VolumeDetachFailed, self.detach)
        self.agent.containers[self.instance.uuid]['state'] = 'defined'
        self.detach()
        self.assertEqual(1, len(self.volumes()))
        self.assertEqual([], self.connected)
        self.instance.host = 'host1'
        self.driver.destroy(self.context, self.instance, [])
        # It is not there at all.
        self.detach()

    def test_one_of_two_servers_has_it_still(self):
        self.spawn()
        self.attach()
        first = self.another()
        self.detach()
        self.assertTrue(self.connected)
        self.instance = first
        self.detach()
        self.assertEqual([], self.connected)

    def test_one_that_is_just_getting_it(self):
        """The agent knows nothing of that server yet."""
        self.spawn()
        self.attach()
        other = self.make_instance(uuid=uuids.second)
        with self.driver._volumes.connecting(other):
            self.driver._volumes.connect(
                self.context, self.info(), '/dev/vdb', other)
            self.detach()
            self.assertTrue(self.connected)
        self.driver._volumes.disconnect(self.info(), other)
        self.assertEqual([], self.connected)

    def test_copies_that_left_have_no_use_for_it(self):
        self.spawn()
        self.attach()
        first = self.another()
        self.agent.containers[first.uuid].update(
            state='stopped', offered=True)
        self.detach()
        self.assertEqual([], self.connected)

    def test_attach_that_cannot_be_taken_back(self):
        """The device stays as long as the guest has a node of it."""
        self.spawn()
        self.agent.failures['volume_detach'] = errors.ContainerError(
            'in_use', '/dev/vdb is open in the guest (dd)')

        def fail(instance):
            raise exception.InstanceNotFound(instance_id=instance.uuid)

        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.save', fail))
        self.assertRaises(exception.InstanceNotFound, self.attach)
        self.assertEqual(['/dev/loop77'], self.connected)

    def test_through_a_life(self):
        one, two = self.info(), self.info(uuids.other, '/dev/loop78')
        self.spawn(block_device_info=self.bdi(one))
        self.assertEqual(1, len(self.volumes()))
        for call in (
                lambda: self.driver.reboot(
                    self.context, self.instance, self.network_info, 'HARD',
                    block_device_info=self.bdi(one, two)),
                lambda: (self.driver.power_off(self.instance),
                         self.driver.power_on(
                             self.context, self.instance, self.network_info,
                             block_device_info=self.bdi(one, two)))):
            call()
            self.assertEqual(['vdb', 'vdc'], [v[1] for v in self.volumes()])
        self.driver.destroy(
            self.context, self.instance, self.network_info,
            block_device_info=self.bdi(one, two))
        self.assertEqual([], self.connected)

    def test_failed_spawn(self):
        self.agent.failures['start_container'] = errors.ContainerError(
            'oci_failed', 'it did not start')
        self.assertRaises(
            exception.InstanceDeployFailure, self.spawn,
            block_device_info=self.bdi(self.info()))
        self.assertEqual([], self.connected)
        self.assert_nothing_left()

    def test_usage(self):
        self.spawn()
        self.attach()
        bdm = {'volume_id': uuids.volume, 'device_name': '/dev/vdb'}
        servers = [{'instance': self.instance, 'instance_bdms': [bdm]}]
        self.assertEqual([], self.driver.get_all_volume_usage(
            self.context, servers))
        [volume] = self.agent.containers[self.instance.uuid]['volumes']
        volume['statistics'] = {
            'read_requests': 1, 'read_bytes': 2, 'write_requests': 3,
            'write_bytes': 4, 'size_bytes': 5}
        self.assertEqual(
            [{'volume': uuids.volume, 'instance': self.instance, 'rd_req': 1,
              'rd_bytes': 2, 'wr_req': 3, 'wr_bytes': 4}],
            self.driver.get_all_volume_usage(self.context, servers))
