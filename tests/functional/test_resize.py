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

"""Cold migration and resize, with real containers on two hosts."""

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova.tests.functional.api import client

from nova_pycontainer import arrival
from nova_pycontainer.runtime import errors
from tests import cases
from tests.functional import agents
from tests.functional import test_snapshots

GIB = 1 << 30


class ResizeTest(test_snapshots.TestCase):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        super().setUp()
        self.large = self._create_flavor(
            memory_mb=384, vcpu=2, disk=2, ephemeral=0)

    def start(self, **values):
        """A server with files of its own, and what its console has said."""
        server = self.boot(**values)
        self.change(server)
        self.sh(server, 'echo seen by all > /dev/console; sync')
        self.wait_for(lambda: b'seen by all' in self.log(server),
                      'the console')
        return server

    def log(self, server, host='host1'):
        return self.agents.client(host).console_log(server['id'])

    def containers(self, host):
        return {info['uuid'] for info in self.agents.client(host).list()}

    def resize(self, server, flavor=None, **values):
        return self.action(server, 'VERIFY_RESIZE', 'resize', {
            'flavorRef': flavor or self.large, **values})

    def confirm(self, server, status='ACTIVE'):
        self.api.post_server_action(server['id'], {'confirmResize': None})
        return self.wait_for(
            lambda: self._settled(server, status), 'confirmResize')

    def assert_size(self, server, host, memory, disk, real=None):
        resources = self.info(server, host)['resources']
        self.assertEqual((memory << 20, disk * GIB), (
            resources['memory_bytes'], resources['disk_bytes']))
        size = self.sh(server, "df -k / | awk 'END { print $2 }'", host)
        self.assertAlmostEqual(
            real or disk, int(size) / (1 << 20), delta=0.15)

    def assert_only_at(self, server, host):
        self.assertEqual(
            {'host1': set(), 'host2': set()} | {host: {server['id']}},
            {name: self.containers(name) for name in ('host1', 'host2')})

    def test_migrate_and_confirm(self):
        server = self.start(config_drive=True)
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.assert_changed(server, 'host2')
        self.assertIn(b'seen by all', self.log(server, 'host2'))
        self.assertIn(server['id'], self.sh(
            server, 'cat /config-drive/openstack/latest/meta_data.json',
            'host2'))
        # The source has it still, and does not start it.
        info = self.info(server)
        self.assertEqual('stopped', info['state'])
        self.assertTrue(info['offered'])
        error = self.assertRaises(
            errors.ContainerError, self.agents.client('host1').prepare,
            server['id'])
        self.assertIn('moved to another host', str(error))
        self.confirm(server)
        self.assert_only_at(server, 'host2')
        self.assert_changed(server, 'host2')
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host1'})
        self.confirm(server)
        self.assert_only_at(server, 'host1')
        self.assert_changed(server)
        self.delete(server)
        self.assert_nothing_left()
        self.assert_nothing_left('host2')

    def test_migrate_and_revert(self):
        server = self.start()
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.sh(server, 'rm -r /data', 'host2')
        self.action(server, 'ACTIVE', 'revertResize')
        self.assert_changed(server)
        self.assert_only_at(server, 'host1')

    @cases.more
    def test_migrate_a_stopped_server(self):
        server = self.start()
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.assertEqual('defined', self.info(server, 'host2')['state'])
        self.confirm(server, 'SHUTOFF')
        self.assert_only_at(server, 'host2')
        self.action(server, 'ACTIVE', 'os-start')
        self.assert_changed(server, 'host2')

    def test_resize_to_another_host(self):
        server = self.start()
        self.resize(server)
        self.assert_size(server, 'host2', 384, 2)
        self.assert_changed(server, 'host2')
        self.action(server, 'ACTIVE', 'revertResize')
        self.assert_size(server, 'host1', 256, 1)
        self.resize(server)
        self.confirm(server)
        self.assert_only_at(server, 'host2')
        self.assert_size(server, 'host2', 384, 2)
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_size(server, 'host2', 384, 2)
        self.assert_changed(server, 'host2')

    def test_resize_on_one_host(self):
        self.flags(allow_resize_to_same_host=True)
        server = self.start()
        self.api.put_service(
            self.service('host2')['id'], {'status': 'disabled'})
        self.resize(server)
        self.assert_size(server, 'host1', 384, 2)
        self.assert_changed(server)
        self.sh(server, 'dd if=/dev/zero of=/more bs=1M count=64; sync')
        self.action(server, 'ACTIVE', 'revertResize')
        # What has become larger stays so, with what is on it.
        self.assert_size(server, 'host1', 256, 1, real=2)
        self.assertEqual('67108864', self.sh(server, 'stat -c %s /more'))
        self.resize(server)
        self.confirm(server)
        self.assert_size(server, 'host1', 384, 2)
        self.assert_changed(server)

    def test_ephemeral_disk_and_swap(self):
        server = self.start()
        flavor = self._create_flavor(
            memory_mb=256, vcpu=1, disk=1, ephemeral=1, swap=64)
        self.resize(server, flavor)
        self.assert_size(server, 'host2', 256, 2)
        self.assert_changed(server, 'host2')
        self.assertEqual(
            64 << 20, self.info(server, 'host2')['resources']['swap_bytes'])
        self.confirm(server)
        self.delete(server)
        self.flavor = flavor
        self.assert_size(self.boot(), 'host1', 256, 2)

    def test_what_does_not_fit(self):
        odd = self._create_flavor(
            memory_mb=256, vcpu=1, disk=2, ephemeral=0,
            extra_spec={'quota:disk_total_bytes_sec': '1'})
        small, self.flavor = self.flavor, self.large
        server = self.start()
        error = self.assertRaises(
            client.OpenStackApiException, self.api.post_server_action,
            server['id'], {'resize': {'flavorRef': small}})
        self.assertIn('smaller', str(error))
        self.api.post_server_action(
            server['id'], {'resize': {'flavorRef': odd}})
        self.wait_for(lambda: 'disk_total_bytes' in self.faults(server),
                      'the refusal')
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'ACTIVE')
        self.assert_changed(server)
        self.assert_only_at(server, 'host1')

    def faults(self, server):
        """What the actions of a server say of why they failed."""
        return str([
            event for action in self.api.get_instance_actions(server['id'])
            for event in self.api.api_get(
                f'/servers/{server["id"]}/os-instance-actions/'
                f'{action["request_id"]}').body['instanceAction']['events']])

    @cases.more
    def test_source_agent_is_restarted(self):
        server = self.start()
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.agents.stop('host1')
        self.agents.start('host1')
        self.wait_for(lambda: self.info(server)['offered'], 'the agent')
        self.action(server, 'ACTIVE', 'revertResize')
        self.assert_changed(server)
        self.assert_only_at(server, 'host1')

    def test_nova_compute_dies_while_it_stops(self):
        server = self.start()
        agent = self.agents.client('host1')
        # As in a resize: else Nova stops what it sees stopped.
        instance = self.instance(server)
        instance.task_state = task_states.RESIZE_MIGRATING
        instance.save()
        agent.stop(server['id'], 0)
        agent.transfer_offer(
            server['id'], server['id'],
            self.agents.client('host2').host_info()['migration'])
        self.computes['host1'].driver.finish_revert_migration(
            None, instance, [], None, None, True)
        self.assertEqual(power_state.RUNNING, self.computes[
            'host1'].driver.get_info(instance).state)
        self.assert_changed(server)

    def break_at(self, point, flavor=None):
        """A server that has come to the second host in part only."""
        server = self.start()
        self.restart_agent('host2', PYCONTAINER_FAULTS=f'{point}=raise')
        self.api.post_server_action(server['id'], (
            {'resize': {'flavorRef': flavor}} if flavor else
            {'migrate': {'host': 'host2'}}))
        self.wait(server, 'ERROR')
        # All of it is where it was.
        self.assertTrue(self.info(server)['offered'])
        self.assertTrue(self.info(server, 'host2')['incoming'])
        error = self.assertRaises(
            errors.ContainerError, self.agents.client('host2').prepare,
            server['id'])
        self.assertIn('have not all come', str(error))
        return server

    @cases.more
    def test_destination_fails_and_tries_again(self):
        server = self.break_at('taking.files')
        self.api.post_server_action(
            server['id'], {'reboot': {'type': 'HARD'}})
        self.wait_for(
            lambda: self.api.get_server(server['id'])['status'] == 'ACTIVE',
            'the reboot')
        self.assert_changed(server, 'host2')
        self.assertTrue(self.info(server)['offered'])
        self.periodic('_run_image_cache_manager_pass')
        self.assert_only_at(server, 'host2')

    def test_destination_fails_and_its_state_is_reset(self):
        server = self.break_at('taking.connected')
        self.api.post_server_action(
            server['id'], {'os-resetState': {'state': 'active'}})
        # What the source has is all that there is of it.
        self.periodic('_run_image_cache_manager_pass')
        self.assertTrue(self.info(server)['offered'])
        self.agents.client('host2').delete(server['id'])
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_changed(server, 'host2')
        self.periodic('_run_image_cache_manager_pass')
        self.assert_only_at(server, 'host2')

    def interrupted(self, server, source_is_down=False):
        """As if nova-compute had ended where the agent has failed.

        :param source_is_down: the source boots after it has started again
        """
        self.restart_agent('host2')
        instance = self.instance(server)
        record = arrival.record_of(instance._context, instance)
        record.status = 'post-migrating'
        record.save()
        self.computes['host2'].manager._set_instance_info(
            instance, instance.new_flavor)
        instance.vm_state = vm_states.ACTIVE
        instance.task_state = task_states.RESIZE_FINISH
        instance.save()
        if source_is_down:
            self.agents.stop('host1')
        log = self.useFixture(fixtures.FakeLogger('nova_pycontainer.arrival'))
        self.restart('host2')
        if source_is_down:
            self.wait_for(lambda: 'Waiting for host host1' in log.output,
                          'the destination to ask')
            self.agents.start('host1')
        self.wait_for(lambda: self._settled(server, 'VERIFY_RESIZE'),
                      'the rest of the resize')

    def test_nova_compute_dies_while_it_comes(self):
        server = self.break_at('taking.files', self.large)
        self.interrupted(server)
        self.assert_size(server, 'host2', 384, 2)
        self.assert_changed(server, 'host2')
        self.action(server, 'ACTIVE', 'revertResize')
        self.assert_size(server, 'host1', 256, 1)
        self.assert_changed(server)
        self.assert_only_at(server, 'host1')

    @cases.more
    def test_both_hosts_boot_while_it_comes(self):
        server = self.break_at('taking.files')
        self.interrupted(server, source_is_down=True)
        self.confirm(server)
        self.assert_changed(server, 'host2')
        self.assert_only_at(server, 'host2')

    @cases.more
    def test_nova_compute_dies_before_it_comes(self):
        server = self.break_at('taking.connected', self.large)
        self.agents.client('host2').delete(server['id'])
        self.interrupted(server, source_is_down=True)
        self.assert_size(server, 'host2', 384, 2)
        self.confirm(server)
        self.assert_changed(server, 'host2')
        self.assert_only_at(server, 'host2')

    @cases.more
    def test_destination_fails_and_it_is_deleted(self):
        server = self.break_at('taking.connected')
        # Nova knows only the new host, and forgets the old one.
        self.api.delete_server(server['id'])
        self.wait_for(lambda: not self.api.get_servers(), 'the deletion')
        self.periodic('_run_image_cache_manager_pass')
        self.assert_nothing_left()
        self.assert_nothing_left('host2')
