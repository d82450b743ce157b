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

"""The driver as the compute manager sees it, over an agent in memory."""

from unittest import mock

import ddt
import fixtures
from nova.compute import power_state
from nova.compute import provider_tree
from nova import exception
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import migration_data
from nova_pycontainer.runtime import errors
from nova_pycontainer import vif
from tests.unit.driver import base
from tests.unit.driver import driver_base


@ddt.ddt
class RemoveTestCase(driver_base.Base):

    def test_destroy(self):
        self.spawn()
        self.instance.system_metadata.clear()
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.assert_nothing_left()
        self.assertRaises(exception.InstanceNotFound, self.state)
        self.assertFalse(self.driver.instance_exists(self.instance))

    def test_destroy_what_is_not_there(self):
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.driver.cleanup(self.context, self.instance, self.network_info)
        self.driver.destroy(self.context, self.instance, None)

    def test_keep_disks(self):
        self.spawn()
        self.driver.destroy(self.context, self.instance, self.network_info,
                            destroy_disks=False)
        self.assertEqual(power_state.SHUTDOWN, self.state())
        self.assertEqual({}, self.plugged)

    def test_cleanup_without_vifs(self):
        self.spawn()
        self.driver.cleanup(self.context, self.instance, self.network_info,
                            destroy_vifs=False)
        self.assertEqual(2, len(self.plugged))

    def test_cleanup_after_a_migration(self):
        """It runs elsewhere, whatever becomes of what is here."""
        self.spawn()
        self.agent.failures['delete'] = errors.ContainerError(
            'timeout', 'it has too many files')
        data = migration_data.create(None, None, None)
        self.driver.cleanup(self.context, self.instance, self.network_info,
                            migrate_data=data)
        self.assertRaises(
            exception.InstanceTerminationFailure, self.driver.cleanup,
            self.context, self.instance, self.network_info)
        self.agent.down = True
        self.driver.post_live_migration_at_source(
            self.context, self.instance, self.network_info)

    def test_agent_absent(self):
        self.spawn()
        self.agent.down = True
        self.assertRaises(
            exception.HypervisorUnavailable, self.driver.destroy,
            self.context, self.instance, self.network_info)
        self.assertFalse(self.driver.delete_instance_files(self.instance))
        self.agent.down = False
        self.assertTrue(self.driver.delete_instance_files(self.instance))
        self.assertEqual({}, self.agent.containers)


@ddt.ddt
class PowerTestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.spawn()
        self.agent.calls.clear()
        self.item = self.agent.containers[uuids.instance]

    def test_states(self):
        for state, expected in (
                ('defined', power_state.SHUTDOWN),
                ('created', power_state.NOSTATE),
                ('running', power_state.RUNNING),
                ('paused', power_state.PAUSED),
                ('stopped', power_state.SHUTDOWN),
                ('something-new', power_state.NOSTATE)):
            self.item['state'] = state
            self.assertEqual(expected, self.state(), state)

    def test_off_and_on(self):
        self.driver.power_off(self.instance, 30, 5)
        self.assertEqual(power_state.SHUTDOWN, self.state())
        self.assertEqual({'code': 0, 'signal': None}, self.item['exit'])
        self.assertEqual({}, self.agent.links)
        self.driver.power_off(self.instance)
        self.plugged.clear()
        self.driver.power_on(self.context, self.instance, self.network_info)
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertEqual(2, len(self.agent.links))
        self.assertEqual(2, len(self.plugged))

    def test_stubborn_guest_is_killed(self):
        self.agent.stubborn.add(uuids.instance)
        self.driver.power_off(self.instance, 1, 1)
        self.assertEqual(9, self.item['exit']['signal'])

    def test_on_while_it_runs(self):
        self.driver.power_on(self.context, self.instance, self.network_info)
        self.assertEqual(['info'], self.agent.calls)

    def test_on_after_half_a_start(self):
        self.item['state'] = 'created'
        self.driver.power_on(self.context, self.instance, self.network_info)
        self.assertEqual(power_state.RUNNING, self.state())

    def test_flavor_and_ports_of_the_database_count(self):
        self.driver.power_off(self.instance)
        self.instance.flavor.memory_mb = 1024
        self.driver.power_on(self.context, self.instance,
                             [base.make_vif(3)])
        spec = self.item['spec']
        self.assertEqual(1024 << 20, spec['resources']['memory_bytes'])
        self.assertEqual([uuids.port3], [n['id'] for n in spec['nics']])

    def test_failed_start_is_off_again(self):
        self.driver.power_off(self.instance)
        self.agent.failures['start_container'] = errors.ContainerError(
            'oci_failed', 'no')
        self.assertRaises(
            exception.InstancePowerOnFailure, self.driver.power_on,
            self.context, self.instance, self.network_info)
        self.assertEqual(power_state.SHUTDOWN, self.state())

    @ddt.data(('SOFT', None), ('HARD', 9))
    @ddt.unpack
    def test_reboot(self, kind, signal):
        self.driver.reboot(
            self.context, self.instance, self.network_info, kind)
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertEqual(signal, self.item['exit']['signal'])
        self.assertEqual(2, len(self.agent.links))

    @ddt.data('SOFT', 'HARD')
    def test_reboot_of_a_stopped_or_paused_one(self, kind):
        self.driver.power_off(self.instance)
        self.driver.reboot(
            self.context, self.instance, self.network_info, kind)
        self.assertEqual(power_state.RUNNING, self.state())
        self.driver.pause(self.instance)
        self.driver.reboot(
            self.context, self.instance, self.network_info, kind)
        self.assertEqual(power_state.RUNNING, self.state())

    def test_lost_disk(self):
        self.agent.containers.clear()
        for call in (
                lambda: self.driver.power_on(
                    self.context, self.instance, self.network_info),
                lambda: self.driver.reboot(
                    self.context, self.instance, self.network_info, 'HARD')):
            error = self.assertRaises(exception.InstancePowerOnFailure, call)
            self.assertIn('Rebuild', str(error))
        self.driver.power_off(self.instance)

    def test_pause(self):
        self.driver.pause(self.instance)
        self.assertEqual(power_state.PAUSED, self.state())
        self.driver.unpause(self.instance)
        self.assertEqual(power_state.RUNNING, self.state())
        self.driver.power_off(self.instance)
        self.assertRaises(exception.InstanceSuspendFailure,
                          self.driver.pause, self.instance)

    def test_serial_console(self):
        console = self.driver.get_serial_console(self.context, self.instance)
        self.assertEqual(
            ('127.0.0.1', 6084,
             f'/secret-{self.instance.uuid}'),
            (console.host, console.port, console.internal_access_path))
        self.driver.power_off(self.instance)
        self.assertRaises(
            exception.InstanceNotReady, self.driver.get_serial_console,
            self.context, self.instance)

    def _agent_dies_in(self, verb, *, when_done, times=1):
        """It is killed in the middle of a verb, and comes back."""
        real = getattr(self.agent, verb)
        left = [times]

        def dies(*args, **kwargs):
            if not left[0]:
                return real(*args, **kwargs)
            left[0] -= 1
            if when_done:
                real(*args, **kwargs)
            raise errors.AgentUnavailable('agent_unavailable', 'it went away')

        return mock.patch.object(
            self.agent, verb, autospec=True, side_effect=dies)

    def _resume(self):
        self.driver.resume(
            self.context, self.instance, self.network_info, None, None)

    def test_suspend_and_the_agent_dies(self):
        for when_done in False, True:
            with self._agent_dies_in('suspend', when_done=when_done):
                self.driver.suspend(self.context, self.instance)
            self.assertEqual(power_state.SUSPENDED, self.state())
            with self._agent_dies_in('resume', when_done=when_done):
                self._resume()
            self.assertEqual(power_state.RUNNING, self.state())

    def test_suspend_and_the_agent_dies_again_and_again(self):
        self.driver.suspend(self.context, self.instance)
        with self._agent_dies_in('resume', when_done=False, times=2):
            error = self.assertRaises(
                exception.InstanceFaultRollback, self._resume)
        self.assertIn('suspended as before', str(error.inner_exception))
        self.assertEqual(power_state.SUSPENDED, self.state())

    def test_suspend(self):
        self.driver.suspend(self.context, self.instance)
        self.assertEqual(power_state.SUSPENDED, self.state())
        # A request that waited while a restart has done it.
        self.driver.suspend(self.context, self.instance)
        self.assertEqual(power_state.SUSPENDED, self.state())
        # By position, as the manager does it, who may repeat it.
        for _ in range(2):
            self.driver.resume(
                self.context, self.instance, self.network_info, None, None)
            self.assertEqual(power_state.RUNNING, self.state())
        # A port that fails is no reason to lose its memory.
        self.driver.suspend(self.context, self.instance)
        with mock.patch.object(vif, 'plug', autospec=True, side_effect=(
                exception.VirtualInterfacePlugException)):
            error = self.assertRaises(
                exception.InstanceFaultRollback, self.driver.resume,
                self.context, self.instance, self.network_info)
        self.assertIsInstance(
            error.inner_exception, exception.VirtualInterfacePlugException)
        self.assertEqual(power_state.SUSPENDED, self.state())
        self.driver.power_off(self.instance)
        error = self.assertRaises(
            exception.InstanceFaultRollback, self.driver.resume,
            self.context, self.instance, self.network_info)
        self.assertIsInstance(
            error.inner_exception, exception.InstanceResumeFailure)

    def test_resume_after_the_hosts_boot(self):
        # By position, as the manager does it.
        def resume():
            self.driver.resume_state_on_host_boot(
                self.context, self.instance, self.network_info, None, {})

        self.item['state'] = 'stopped'
        self.agent.links.clear()
        resume()
        self.assertEqual(power_state.RUNNING, self.state())
        self.agent.calls.clear()
        resume()
        self.driver.pause(self.instance)
        resume()
        self.assertEqual(power_state.PAUSED, self.state())
        self.assertNotIn('prepare', self.agent.calls)

    def test_console(self):
        self.item['console'] = b'x' * 200000 + 'grüße'.encode()
        output = self.driver.get_console_output(self.context, self.instance)
        self.assertIsInstance(output, bytes)
        self.assertEqual(102400, len(output))
        self.assertTrue(output.endswith('grüße'.encode()))
        self.agent.containers.clear()
        self.assertRaises(
            exception.InstanceNotFound, self.driver.get_console_output,
            self.context, self.instance)

    def test_plug_and_unplug(self):
        self.driver.plug_vifs(self.instance, self.network_info)
        self.assertEqual(2, len(self.agent.links))
        self.driver.unplug_vifs(self.instance, self.network_info)
        self.assertEqual({}, self.agent.links)
        self.assertEqual({}, self.plugged)
        self.agent.failures['plug'] = errors.ContainerError('network', 'no')
        # What the manager expects at its start.
        self.assertRaises(
            exception.VirtualInterfacePlugException, self.driver.plug_vifs,
            self.instance, self.network_info)


class ServiceTestCase(driver_base.Base):

    def test_no_agent_no_service(self):
        self.flags(agent_start_timeout=0, group='pycontainer')
        self.agent.down = True
        error = self.assertRaises(
            exception.HypervisorUnavailable, self.driver.init_host, 'host1')
        self.assertIn('Start pycontainer-agent', str(error))

    def test_agent_that_comes_late(self):
        host_info = self.agent.host_info
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.driver._RETRY_S', 0))
        left = [2]

        def late():
            left[0] -= 1
            self.agent.down = left[0] > 0
            return host_info()

        self.agent.host_info = late
        self.driver.init_host('host1')

    def test_agent_that_refuses(self):
        self.agent.failures['host_info'] = errors.ContainerError(
            'unsupported', 'version 2 and version 1')
        error = self.assertRaises(
            exception.HypervisorUnavailable, self.driver.init_host, 'host1')
        self.assertIn('version 2', str(error))

    def test_agent_absent_is_no_power_state(self):
        self.spawn()
        self.agent.down = True
        self.assertRaises(exception.HypervisorUnavailable, self.state)
        self.assertRaises(exception.HypervisorUnavailable,
                          self.driver.instance_exists, self.instance)
        # The periodic tasks skip their turn.
        for call in (self.driver.get_num_instances,
                     self.driver.list_instances,
                     self.driver.list_instance_uuids):
            self.assertRaises(exception.VirtDriverNotReady, call)
        self.driver._watcher.failure = errors.AgentUnavailable(
            'agent_unavailable', 'no answer')
        self.assertRaises(exception.VirtDriverNotReady,
                          self.driver.get_nodenames_by_uuid)
        # What the end of an operation needs.
        self.assertEqual(['host1'], self.driver.get_available_nodes())
        self.assertTrue(self.driver.node_is_available('host1'))
        self.assertFalse(self.driver.node_is_available('host2'))

    def test_nodes(self):
        self.assertEqual(['host1'], self.driver.get_available_nodes())
        self.assertEqual({uuids.node_host1: 'host1'},
                         self.driver.get_nodenames_by_uuid())
        self.assertEqual(self.driver._host.ip,
                         self.driver.get_host_ip_addr())

    def test_events_are_followed_from_the_first_update_on(self):
        self.addCleanup(self.driver.cleanup_host, 'host1')
        self.assertIsNone(self.driver._watcher._thread)
        resources = self.driver.get_available_resource('host1')
        self.assertIsNotNone(self.driver._watcher._thread)
        self.assertEqual('host1', resources['hypervisor_hostname'])
        self.assertIn('load average', resources['stats']['uptime'])

    def test_resources_without_an_agent(self):
        """Claims are dropped at the end of an operation all the same."""
        self.addCleanup(self.driver.cleanup_host, 'host1')
        self.agent.down = True
        self.assertRaises(exception.VirtDriverNotReady,
                          self.driver.get_available_resource, 'host1')
        self.agent.down = False
        resources = self.driver.get_available_resource('host1')
        self.agent.down = True
        self.assertEqual(
            resources, self.driver.get_available_resource('host1'))
        tree = provider_tree.ProviderTree()
        tree.new_root('host1', uuids.node_host1)
        self.driver.update_provider_tree(tree, 'host1')
        self.assertEqual({}, tree.data('host1').inventory)

    def test_shutdown_timeout_of_any_size(self):
        for given, told in ((-1, 0), (604800, 86400), (7, 7)):
            with mock.patch.object(
                    self.agent, 'stop', autospec=True) as stop:
                self.driver.power_off(self.instance, given)
            stop.assert_called_once_with(self.instance.uuid, told)

    def test_rest_of_a_failed_spawn_that_cannot_be_removed(self):
        self.driver._spawner._leftovers[uuids.instance] = ['tap1']
        self.agent.failures['delete'] = errors.ContainerError(
            'timeout', 'the container did not die')
        self.driver._agent_up()
        self.addCleanup(self.driver.cleanup_host, 'host1')
        self.driver.get_available_resource('host1')
        self.assertIn(uuids.instance, self.driver._spawner._leftovers)
        del self.agent.failures['delete']
        self.driver.get_available_resource('host1')
        self.assertEqual({}, self.driver._spawner._leftovers)

    def test_reboots_never_hang(self):
        self.driver.poll_rebooting_instances(60, [self.instance])

    def test_traits_of_capabilities(self):
        traits = self.driver.capabilities_as_traits()
        self.assertEqual(
            {'COMPUTE_DEVICE_TAGGING', 'COMPUTE_IMAGE_TYPE_RAW',
             'COMPUTE_NET_ATTACH_INTERFACE',
             'COMPUTE_NET_ATTACH_INTERFACE_WITH_TAG',
             'COMPUTE_RESCUE_BFV', 'COMPUTE_TRUSTED_CERTS',
             'COMPUTE_VOLUME_ATTACH_WITH_TAG',
             'COMPUTE_VOLUME_EXTEND', 'COMPUTE_VOLUME_MULTI_ATTACH'},
            {name for name, present in traits.items() if present})
