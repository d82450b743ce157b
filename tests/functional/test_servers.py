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

"""Servers from creation to deletion, through Nova's API."""

import platform
import threading

from nova import context as nova_context
from nova import exception
from nova.tests.functional.api import client

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import revert
from tests import cases
from tests.functional import agents
from tests.functional import base


class ServersTest(base.TestCase):

    def test_life(self):
        server = self.boot()
        self.assertEqual('host1', server['OS-EXT-SRV-ATTR:host'])
        self.assertEqual(1, server['OS-EXT-STS:power_state'])
        info = self.info(server)
        self.assertEqual('running', info['state'])
        self.assertEqual(str(info['base_id']), self.instance(
            server).system_metadata['pycontainer_base_id'])
        self.assertEqual(server['OS-EXT-SRV-ATTR:instance_name'],
                         info['name'])
        self.assertEqual(256 << 20, info['resources']['memory_bytes'])
        self.assertEqual(1 << 30, info['resources']['disk_bytes'])
        self.assertEqual(1, len(info['nics']))
        self.assertEqual([info['nics'][0]['devname']], [*self.plugged])

        self.action(server, 'SHUTOFF', 'os-stop')
        self.assertEqual('stopped', self.info(server)['state'])
        self.action(server, 'ACTIVE', 'os-start')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'SOFT'})
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assertEqual('running', self.info(server)['state'])
        self.assertEqual(info['base_id'], self.info(server)['base_id'])
        self.action(server, 'PAUSED', 'pause')
        self.assertEqual('paused', self.info(server)['state'])
        self.action(server, 'ACTIVE', 'unpause')

        output = self.api.post_server_action(
            server['id'], {'os-getConsoleOutput': {}})
        self.assertIn('Start-up done', output['output'])
        self.delete(server)
        self.assert_nothing_left()

    def test_suspend_and_resume(self):
        server = self.boot()
        nics = self.info(server)['nics']
        for _ in range(2):
            self.action(server, 'SUSPENDED', 'suspend')
            self.assertEqual('suspended', self.info(server)['state'])
            # Looked at by the periodic task, it stays what it is.
            self.periodic('_sync_power_states')
            self.action(server, 'ACTIVE', 'resume')
            self.assertEqual('running', self.info(server)['state'])
        self.assertEqual([nic['devname'] for nic in nics], [*self.plugged])
        self.action(server, 'SUSPENDED', 'suspend')
        self.restart()
        self.action(server, 'ACTIVE', 'resume')
        self.action(server, 'SUSPENDED', 'suspend')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assertEqual('running', self.info(server)['state'])
        self.action(server, 'SUSPENDED', 'suspend')
        self.delete(server)
        self.assert_nothing_left()

    def test_suspend_that_fails(self):
        """No harm is done: the server is as it was, and says why."""
        server = self.boot()
        agent = self.agents.client('host1')
        agent.exec(server['id'], [
            '/bin/sh', '-c', 'mkdir /memory; mount -t tmpfs x /memory; '
            'head -c 60000000 /dev/urandom > /memory/data; '
            'dd if=/dev/zero of=/full bs=1M'], timeout_s=60)
        self.api.post_server_action(server['id'], {'suspend': None})
        self.wait_for(lambda: self._failed(server, 'suspend'), 'the failure')
        self.assertEqual('ACTIVE', self._settled(server, 'ACTIVE')['status'])
        self.assertEqual('running', self.info(server)['state'])
        agent.exec(server['id'], ['rm', '/full'])
        self.action(server, 'SUSPENDED', 'suspend')
        self.action(server, 'ACTIVE', 'resume')

    def test_requests_that_a_restart_has_given_up(self):
        server = self.boot()
        manager = self.computes['host1'].manager

        def asked_too_late(verb, task, state):
            # As the message has it. In the database it is none.
            instance = self.instance(server)
            vm_state = instance.vm_state
            instance.task_state = task
            instance.obj_reset_changes()
            self.assertRaises(exception.UnexpectedTaskStateError, verb,
                              instance._context, instance)
            self.assertEqual(state, self.info(server)['state'])
            self.assertEqual(vm_state, self.instance(server).vm_state)

        asked_too_late(manager.pause_instance, 'pausing', 'running')
        asked_too_late(manager.suspend_instance, 'suspending', 'running')
        self.action(server, 'PAUSED', 'pause')
        self.action(server, 'ACTIVE', 'unpause')
        self.action(server, 'SUSPENDED', 'suspend')
        asked_too_late(manager.resume_instance, 'resuming', 'suspended')
        self.action(server, 'ACTIVE', 'resume')

    def test_agent_dies_in_a_suspend(self):
        """It is restarted, and nobody has to do anything."""
        if agents.Agents is not agents.Real:
            self.skipTest('agents need root; run tools/run_tests.sh')
        server = self.boot()
        for point, verb, status in (
                ('suspend.dumped', 'suspend', 'SUSPENDED'),
                ('resume.restored', 'resume', 'ACTIVE'),
                ('suspend.saved', 'suspend', 'SUSPENDED'),
                ('resume.committed', 'resume', 'ACTIVE')):
            self.agents.stop('host1')
            self.agents.start('host1', PYCONTAINER_FAULTS=f'{point}=kill')
            self.api.post_server_action(server['id'], {verb: None})
            self.wait_for(lambda: self.agents.died('host1'), point)
            self.agents.start('host1')
            self.wait_for(lambda s=status: self._settled(server, s), point)
        self.assertEqual('running', self.info(server)['state'])

    def _failed(self, server, action):
        actions = self.api.get_instance_actions(server['id'])
        return any(a['action'] == action and a['message'] == 'Error'
                   for a in actions)

    def test_attach_and_detach_interface(self):
        server = self.boot(networks=[{'port': self.neutron.port_1['id']}])
        first, = self.info(server)['nics']
        port = self._second_port()
        self.api.attach_interface(
            server['id'], {'interfaceAttachment': {'port_id': port}})
        self.wait_for(lambda: len(self._ports(server)) == 2, 'the port')
        nics = self.info(server)['nics']
        self.assertEqual([self.neutron.port_1['id'], port],
                         [nic['id'] for nic in nics])
        self.assertEqual({nic['devname'] for nic in nics},
                         set(self.plugged))
        self.api.detach_interface(server['id'], first['id'])
        self.wait_for(lambda: self._ports(server) == [port], 'the end')
        self.assertEqual([nics[1]['devname']], [*self.plugged])
        # A start has what the server has now.
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        nic, = self.info(server)['nics']
        self.assertEqual(port, nic['id'])
        self.delete(server)
        self.assert_nothing_left()

    def _second_port(self):
        return self.neutron.create_port(
            {'port': self.neutron.port_2})['port']['id']

    def _ports(self, server):
        return [item['port_id'] for item in self.api.get_port_interfaces(
            server['id'])]

    def test_attach_that_fails(self):
        server = self.boot(networks=[{'port': self.neutron.port_1['id']}])
        plugged = dict(self.plugged)
        port = self._second_port()
        self.addCleanup(setattr, revert, 'fault_hook', None)
        for name in 'attach.plug', 'attach.plug_vifs', 'attach.attach':
            def fail(step, name=name):
                if step == name:
                    raise errors.ContainerError(
                        'internal', f'failed at {name}')

            revert.fault_hook = fail
            error = self.assertRaises(
                client.OpenStackApiException, self.api.attach_interface,
                server['id'], {'interfaceAttachment': {'port_id': port}})
            self.assertEqual(500, error.response.status_code)
            self.assertEqual(1, len(self.info(server)['nics']))
            self.assertEqual(plugged, self.plugged)
            self.assertEqual('ACTIVE', self.api.get_server(
                server['id'])['status'])

    def test_diagnostics(self):
        server = self.boot()
        info = self.info(server)
        mac = info['nics'][0]['mac']
        self.api.microversion = '2.1'
        figures = self.admin_api.api_get(
            f'/servers/{server["id"]}/diagnostics').body
        self.assertEqual(256 << 10, figures['memory'])
        self.assertIn('cpu0_time', figures)
        with base.microversion(self.admin_api, '2.48'):
            figures = self.admin_api.api_get(
                f'/servers/{server["id"]}/diagnostics').body
        self.assertEqual('running', figures['state'])
        self.assertEqual('pycontainer', figures['hypervisor'])
        self.assertEqual(256, figures['memory_details']['maximum'])
        self.assertEqual([mac], [
            nic['mac_address'] for nic in figures['nic_details']])

    def test_admin_password_without_chpasswd(self):
        """The small system has none; tests/cloud has one that has."""
        server = self.boot()
        error = self.assertRaises(
            client.OpenStackApiException, self.api.post_server_action,
            server['id'], {'changePassword': {'adminPass': 'secret'}})
        self.assertEqual(409, error.response.status_code)
        self.assertNotIn('secret', str(error))

    def test_image_cache(self):
        """Pre-cached, used, and deleted when it has aged."""
        self.flags(remove_unused_original_minimum_age_seconds=0,
                   group='image_cache')
        driver = self.computes['host1'].manager.driver
        context = nova_context.get_admin_context()
        self.assertTrue(driver.cache_image(context, self.image))
        self.assertFalse(driver.cache_image(context, self.image))
        server = self.boot()
        self.assertEqual(1, self.agents.imports('host1'))
        layer = self.info(server)['layer']
        agent = self.agents.client('host1')
        self.periodic('_run_image_cache_manager_pass')
        self.assertTrue(agent.layer_present(layer))
        self.delete(server)
        self.periodic('_run_image_cache_manager_pass')
        self.assertFalse(agent.layer_present(layer))
        self.boot()
        self.assertEqual(2, self.agents.imports('host1'))

    def test_hosts_are_apart(self):
        one, two = self.boot(), self.boot(host='host2')
        self.info(one, 'host1')
        self.info(two, 'host2')
        names = {h['hypervisor_hostname'] for h in self.admin_api.api_get(
            '/os-hypervisors/detail').body['hypervisors']}
        self.assertEqual(set(base.HOSTS), names)

    def test_inventory(self):
        for hypervisor in self.admin_api.api_get(
                '/os-hypervisors/detail').body['hypervisors']:
            self.assertEqual('pycontainer', hypervisor['hypervisor_type'])
            self.assertIn('up', hypervisor['uptime'])
            inventory = self._get_provider_inventory(hypervisor['id'])
            self.assertEqual({'VCPU', 'MEMORY_MB', 'DISK_GB'},
                             set(inventory))
            traits = self._get_provider_traits(hypervisor['id'])
            self.assertIn('CUSTOM_PYCONTAINER', traits)
            self.assertIn('COMPUTE_IMAGE_TYPE_RAW', traits)
            # Instructions that every processor of these has.
            if platform.machine() == 'x86_64' and (
                    agents.Agents is agents.Real):
                for name in ('SSE', 'SSE2'):
                    self.assertIn(f'HW_CPU_X86_{name}', traits)

    def test_speed_of_disks(self):
        if agents.Agents is not agents.Real:
            self.skipTest('limits need root; run tools/run_tests.sh')
        if not self.agents.limits_io():
            self.skipTest('this machine has no controller io or blkio')
        self.flavor = self._create_flavor(
            memory_mb=256, vcpu=1, disk=1, ephemeral=0,
            extra_spec={'quota:disk_read_iops_sec': '900'})
        server = self.boot()
        self.assertRegex(self.agents.cgroup_says(
            'host1', server['id'], 'io.max',
            'blkio.throttle.read_iops_device'), r'\d+:\d+ (.*riops=)?900\b')

    def test_rebuild(self):
        server = self.boot()
        other = self.make_image(self.image_data() + b'\0' * 1024)
        self.api.post_server_action(
            server['id'], {'rebuild': {'imageRef': other}})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'rebuild')
        self.assertEqual(other, self.info(server)['image_id'])
        self.assertEqual(2, self.agents.imports('host1'))

    def test_power_off_in_the_guest(self):
        server = self.boot()
        self.agents.power_off_inside('host1', server['id'])
        # Long before the periodic task, which the tests do not run.
        self.wait(server, 'SHUTOFF')
        self.action(server, 'ACTIVE', 'os-start')

    def test_servers_at_once_unpack_once(self):
        # All of them are in the middle of their spawn before the image comes.
        # (Requests to the API at once would dead-lock the databases of Nova's
        # fixtures.)
        gate = threading.Event()
        self.addCleanup(gate.set)
        download = self.glance.download
        self.glance.download = lambda *args, **kwargs: (
            gate.wait(60), download(*args, **kwargs))[1]
        servers = []
        for _ in range(4):
            server = self.boot(wait=False)
            servers.append(server)
            self.wait_for_task(server, 'spawning')
        gate.set()
        for server in servers:
            self.wait(server, 'ACTIVE')
        self.assertEqual(1, self.agents.imports('host1'))
        ids = {self.info(server)['base_id'] for server in servers}
        self.assertEqual(4, len(ids))
        for server in servers:
            self.delete(server)
        self.assert_nothing_left()

    def test_without_network(self):
        server = self.boot(networks='none')
        self.assertEqual([], self.info(server)['nics'])
        self.delete(server)
        self.assert_nothing_left()

    def test_config_drive(self):
        server = self.boot(config_drive=True, user_data='I2Nsb3VkLWNvbmZpZwo=')
        self.assertEqual('True', server['config_drive'])
        self.delete(server)
        self.assert_nothing_left()


class PlugTest(base.TestCase):
    """Neutron reports ports as plugged only some time later."""

    def setUp(self):
        super().setUp()
        self.port = self.neutron.port_1['id']
        self.neutron._ports[self.port]['status'] = 'DOWN'
        self.networks = [{'port': self.port}]

    def test_init_waits_for_the_port(self):
        self.flags(vif_plugging_timeout=60)
        server = self.boot(networks=self.networks, wait=False)
        self.wait_for(lambda: self._state(server) == 'created', 'the wait')
        self.assertEqual([server['id']], [*self.plugged.values()])
        self.assertEqual('BUILD', self.api.get_server(
            server['id'])['status'])
        self.api.create_server_external_events([{
            'name': 'network-vif-plugged', 'server_uuid': server['id'],
            'tag': self.port, 'status': 'completed'}])
        self.wait(server, 'ACTIVE')
        self.assertEqual('running', self._state(server))

    def test_port_that_never_comes_up(self):
        self.flags(vif_plugging_timeout=1)
        server = self.boot(networks=self.networks, status='ERROR')
        self.assertIn('allocate the network', server['fault']['message'])
        self.assert_nothing_left()

    def test_port_that_fails(self):
        self.flags(vif_plugging_timeout=60)
        server = self.boot(networks=self.networks, wait=False)
        self.wait_for(lambda: self._state(server) == 'created', 'the wait')
        self.api.create_server_external_events([{
            'name': 'network-vif-plugged', 'server_uuid': server['id'],
            'tag': self.port, 'status': 'failed'}])
        self.wait(server, 'ERROR')
        self.assert_nothing_left()

    def _state(self, server):
        try:
            return self.info(server)['state']
        except errors.ContainerError as e:
            self.assertEqual('not_found', e.code)
            return None


class FailuresTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.addCleanup(setattr, revert, 'fault_hook', None)

    def test_spawn_fails_at_each_step(self):
        names = []
        revert.fault_hook = names.append
        self.delete(self.boot())
        self.assertIn('spawn.start', names)
        for name in names:
            def fail(step, name=name):
                if step == name:
                    raise errors.ContainerError(
                        'internal', f'failed at {name}')

            revert.fault_hook = fail
            server = self.boot(status='ERROR')
            self.assert_nothing_left()
            self.delete(server)
        revert.fault_hook = None
        self.delete(self.boot())

    def fault(self, data, **meta):
        """Return the fault of a server of this image."""
        image = self.make_image(data, **meta)
        server = self.boot(image=image, status='ERROR')
        message = server['fault']['message']
        self.assertIn(image, message)
        self.assertNotIn('Traceback', message)
        self.assert_nothing_left()
        self.delete(server)
        return message

    @cases.more
    def test_image_that_leaves_its_root(self):
        message = self.fault(base.tarball('sbin/init', '../../etc/crontab'))
        self.assertIn('../../etc/crontab', message)
        self.assertIn('Build the image again', message)

    @cases.more
    def test_image_that_is_no_archive(self):
        message = self.fault(b'MZ' + b'x' * 4096)
        self.assertIn('not an archive', message)
        self.assertIn('Upload a tar archive', message)

    @cases.more
    def test_image_that_says_to_be_a_disk(self):
        message = self.fault(self.image_data(), disk_format='qcow2')
        self.assertIn('disk_format is qcow2', message)
        self.assertIn('Upload a root tarball', message)


class ServiceTest(base.TestCase):

    def test_restart_with_a_running_server(self):
        server = self.boot()
        started = self.info(server)
        self.restart()
        self.assertEqual('running', self.info(server)['state'])
        server = self.api.get_server(server['id'])
        self.assertEqual('ACTIVE', server['status'])
        self.assertEqual(started.get('pid'), self.info(server).get('pid'))
        self.action(server, 'SHUTOFF', 'os-stop')
        self.delete(server)
        self.assert_nothing_left()

    def test_guest_that_powers_off_while_nova_compute_is_down(self):
        server = self.boot()
        self.computes['host1'].stop()
        self.agents.power_off_inside('host1', server['id'])
        self.computes['host1'] = self.start_service('compute', host='host1')
        self.wait(server, 'SHUTOFF')

    def test_host_boots(self):
        self.flags(resume_guests_state_on_host_boot=True)
        server = self.boot()
        stopped = self.boot()
        self.action(stopped, 'SHUTOFF', 'os-stop')
        self.computes['host1'].stop()
        # After a boot of the host no container lives and no interface is
        # there.
        self.agents.power_off_inside('host1', server['id'])
        self.plugged.clear()
        self.computes['host1'] = self.start_service('compute', host='host1')
        self.wait_for(lambda: self.info(server)['state'] == 'running',
                      'the resume')
        self.assertEqual('ACTIVE', self.api.get_server(
            server['id'])['status'])
        self.assertEqual('stopped', self.info(stopped)['state'])
        self.assertIn(self.info(server)['nics'][0]['devname'], self.plugged)

    def test_agent_absent(self):
        server = self.boot()
        self.agents.stop('host1')
        service = self.wait_for(
            lambda: self._disabled('host1'), 'the report')
        self.assertIn('pycontainer', service['disabled_reason'])
        self.assertIn('agent', service['disabled_reason'])
        self.assertEqual('up', service['state'])
        # No power state is made up, whatever looks for one.
        for _ in range(2):
            self.periodic('_sync_power_states')
            self.periodic('update_available_resource')
        server = self.api.get_server(server['id'])
        self.assertEqual(('ACTIVE', 1), (
            server['status'], server['OS-EXT-STS:power_state']))
        # The other host goes on, and gets what is new.
        self.assertEqual('host2', self.boot(host=None)[
            'OS-EXT-SRV-ATTR:host'])
        self.agents.start('host1')
        self.wait_for(lambda: self.service()['status'] == 'enabled',
                      'the return')
        self.periodic('update_available_resource')
        self.action(server, 'SHUTOFF', 'os-stop')

    def test_operators_choice_is_left_alone(self):
        service = self.service()
        self.admin_api.put_service(
            service['id'], {'status': 'disabled',
                            'disabled_reason': 'maintenance'})
        self.agents.stop('host1')
        watcher = self.computes['host1'].manager.driver._watcher
        self.wait_for(lambda: watcher.failure, 'the loss')
        self.agents.start('host1')
        self.wait_for(lambda: watcher.failure is None, 'the return')
        self.assertEqual('maintenance', self.service()['disabled_reason'])

    def test_no_agent_no_start(self):
        self.flags(agent_start_timeout=0, group='pycontainer')
        self.computes['host1'].stop()
        self.agents.stop('host1')
        error = self.assertRaises(
            exception.HypervisorUnavailable, self.start_service, 'compute',
            host='host1')
        self.assertIn('agent', str(error))
        self.agents.start('host1')
        self.computes['host1'] = self.start_service('compute', host='host1')

    def _disabled(self, host):
        service = self.service(host)
        return service if service['status'] == 'disabled' else None
