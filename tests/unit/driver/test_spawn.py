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

"""Spawning, over an agent in memory."""

import ddt
import fixtures
from nova.compute import power_state
from nova import exception
import nova.virt.configdrive
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import revert
from tests.unit.driver import base
from tests.unit.driver import driver_base
from tests.unit.driver import test_image


@ddt.ddt
class SpawnTestCase(driver_base.Base):

    def test_spawn(self):
        self.spawn()
        self.assertEqual(power_state.RUNNING, self.state())
        item = self.agent.containers[uuids.instance]
        self.assertEqual(
            [uuids.port1, uuids.port2], [n['id'] for n in item['nics']])
        self.assertEqual(
            str(item['base_id']),
            self.instance.system_metadata['pycontainer_base_id'])
        names = {'tap' + port[:11] for port in (uuids.port1, uuids.port2)}
        self.assertEqual(names, set(self.agent.links))
        self.assertEqual(names, set(self.plugged))
        self.assertEqual([uuids.instance], self.driver.list_instance_uuids())
        self.assertEqual([self.instance.name], self.driver.list_instances())
        self.assertTrue(self.driver.instance_exists(self.instance))

    def test_power_off_from_the_start(self):
        self.spawn(power_on=False)
        self.assertEqual(power_state.SHUTDOWN, self.state())
        self.assertEqual([], self.virtapi.waited)
        self.driver.power_on(self.context, self.instance, self.network_info)
        self.assertEqual(power_state.RUNNING, self.state())

    def test_waits_for_ports_that_are_down_before_the_init_runs(self):
        self.flags(vif_plugging_timeout=7)
        self.network_info[1]['active'] = False
        seen = []
        wait = self.virtapi.wait_for_instance_event

        def waiting(*args, **kwargs):
            seen.append((len(self.plugged), list(self.agent.calls)))
            return wait(*args, **kwargs)

        self.virtapi.wait_for_instance_event = waiting
        start = self.agent.start_container
        self.agent.start_container = lambda uuid: (
            self.assertTrue(self.virtapi.waited), start(uuid))[1]
        self.spawn()
        self.assertEqual(
            [([('network-vif-plugged', uuids.port2)], 7)],
            self.virtapi.waited)
        # The plan to wait is older than anything that may be waited for.
        self.assertEqual(0, seen[0][0])

    def test_timed_out_ports(self):
        self.network_info[1]['active'] = False
        self.virtapi.error = exception.InstanceEventTimeout()
        error = self.assertRaises(
            exception.VirtualInterfaceCreateException, self.spawn)
        self.assertIn('vif_plugging_timeout', str(error))
        self.assert_nothing_left()
        self.flags(vif_plugging_is_fatal=False)
        self.spawn()
        self.assertEqual(power_state.RUNNING, self.state())

    def test_no_waiting_if_switched_off(self):
        self.flags(vif_plugging_timeout=0)
        self.network_info[1]['active'] = False
        self.virtapi.error = exception.InstanceEventTimeout()
        self.spawn()

    def test_fails_at_each_step_and_leaves_nothing(self):
        # The steps are those of the code: a run that goes well tells them.
        names = []
        self.addCleanup(setattr, revert, 'fault_hook', None)
        revert.fault_hook = names.append
        self.spawn()
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.assertLess(7, len(names))
        self.instance.system_metadata.clear()
        for name in names:
            def fail(step, name=name):
                if step == name:
                    raise errors.ContainerError(
                        'internal', f'failed at {name}')

            revert.fault_hook = fail
            error = self.assertRaises(
                exception.InstanceDeployFailure, self.spawn)
            self.assertIn(f'failed at {name}', str(error))
            self.assert_nothing_left()
        revert.fault_hook = None
        self.spawn()

    @ddt.data('layer_import', 'plug', 'define', 'prepare', 'start_container')
    def test_each_verb_fails_and_leaves_nothing(self, verb):
        self.agent.failures[verb] = errors.ContainerError(
            'internal', 'no', cause='some cause', remedy='Some remedy')
        error = self.assertRaises(
            exception.InstanceDeployFailure, self.spawn)
        self.assertIn('some cause. Some remedy', str(error))
        self.assert_nothing_left()

    def test_failed_os_vif(self):
        def fail(vif, info):
            raise exception.VirtualInterfacePlugException('no ovsdb')

        self.useFixture(fixtures.MonkeyPatch('os_vif.plug', fail))
        self.assertRaises(
            exception.VirtualInterfacePlugException, self.spawn)
        self.assert_nothing_left()

    def test_agent_lost_meanwhile_leaves_nothing_when_it_is_back(self):
        start = self.agent.start_container

        def lost(uuid):
            self.agent.down = True
            start(uuid)

        self.agent.start_container = lost
        self.assertRaises(exception.HypervisorUnavailable, self.spawn)
        self.assertEqual({}, self.plugged)
        self.assertNotEqual({}, self.agent.containers)
        self.agent.down = False
        self.agent.start_container = start
        self.driver._spawner.remove_leftovers()
        self.assert_nothing_left()

    def test_leftovers_do_not_take_a_new_container_along(self):
        self.test_agent_lost_but_back_for_the_next_spawn()
        self.driver._spawner.remove_leftovers()
        self.assertEqual(power_state.RUNNING, self.state())

    def test_agent_lost_but_back_for_the_next_spawn(self):
        define = self.agent.define

        def lost(uuid, spec):
            define(uuid, spec)
            self.agent.down = True
            self.agent.info(uuid)

        self.agent.define = lost
        self.assertRaises(exception.HypervisorUnavailable, self.spawn)
        self.agent.down = False
        self.agent.define = define
        self.spawn()

    def test_root_that_several_servers_may_have_is_refused(self):
        error = self.assertRaises(
            exception.InvalidInput, self.spawn, block_device_info={
                'block_device_mapping': [{
                    'mount_device': '/dev/vda', 'boot_index': 0,
                    'connection_info': {
                        'driver_volume_type': 'local', 'serial': 'many',
                        'multiattach': True, 'data': {}}}]})
        self.assertIn('volume many may be attached', str(error))
        self.assert_nothing_left()

    def test_bad_flavor_costs_no_download(self):
        self.instance.flavor.extra_specs = {'quota:cpu_shares': 'many'}
        self.assertRaises(exception.InvalidInput, self.spawn)
        self.assertEqual([], self.driver._images._api.downloads)

    @ddt.data(
        (b'x' * 512, 'is not an archive'),
        (base.make_tarball('../../etc/passwd'), '../../etc/passwd'))
    @ddt.unpack
    def test_bad_images(self, data, text):
        self.driver._images._api = test_image.Glance(data)
        error = self.assertRaises(exception.ImageUnacceptable, self.spawn)
        for part in (uuids.image, text):
            self.assertIn(part, str(error))
        self.assert_nothing_left()

    def test_config_drive_that_is_forced(self):
        self.flags(force_config_drive=True)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.configdrive.files',
            lambda *args: {'openstack/latest/user_data': 'aGVsbG8='}))
        self.spawn()
        self.assertTrue(self.instance.config_drive)
        self.assertTrue(nova.virt.configdrive.required_by(self.instance))
        self.assertEqual(
            {'openstack/latest/user_data': 'aGVsbG8='},
            self.agent.containers[uuids.instance]['spec']['config_drive'])
