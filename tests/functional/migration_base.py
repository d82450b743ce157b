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

"""What tests of live migration do, with agents of either kind."""

import sys

import fixtures
from nova.compute import rpcapi
from nova import context as nova_context
from nova import objects
import oslo_messaging

from tests.functional import agents
from tests.functional import base


class TestCase(base.TestCase):

    def migrate(self, server, host='host2', status=202, **kwargs):
        return self.api.post_server_action(
            server['id'], {'os-migrateLive': {
                'host': host, 'block_migration': 'auto', **kwargs}},
            check_response_status=[status])

    def records(self, server):
        """Of all its migrations.

        Not through the API, which gathers them from all cells: that and the
        migration itself lock the fixtures' databases against each other.
        """
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.host_mappings['host1'].cell_mapping) as context:
            return objects.MigrationList.get_by_filters(
                context, {'instance_uuid': server['id']})

    def record(self, server):
        """The newest of its migrations, or None."""
        return max(self.records(server), key=lambda record: record.id,
                   default=None)

    def wait_for_migration(self, server, *statuses):
        """Until the last migration has a status and the server is free."""
        def reached():
            record = self.record(server)
            now = self.api.get_server(server['id'])
            if record is None or now['OS-EXT-STS:task_state'] is not None:
                return None
            if record.status in statuses:
                return now
            if record.status in ('completed', 'cancelled'):
                self.fail(f'{record.status}: {self.reason(server)}')
            return None

        return self.wait_for(reached, f'migration {statuses}')

    def reason(self, server):
        """What the action of the server says of its failed events."""
        found = []
        for action in self.api.get_instance_actions(server['id']):
            action = self.api.api_get(
                f'/servers/{server["id"]}/os-instance-actions/'
                f'{action["request_id"]}').body['instanceAction']
            found += [event.get('details') for event in action['events']
                      if event['result'] == 'Error']
        return '\n'.join(str(text) for text in found)

    def allocations(self, server):
        """Which hosts hold resources for the server."""
        uuids = {self._get_provider_uuid_by_host(host): host
                 for host in base.HOSTS}
        found = self._get_allocations_by_server_uuid(server['id'])
        return [uuids[uuid] for uuid in found]

    def dedicated_flavor(self):
        """One with a CPU of its own, of two that each host has from now on."""
        self.flags(cpu_dedicated_set='0-1', group='compute')
        for host in base.HOSTS:
            self.periodic('update_available_resource', host)
        return self._create_flavor(
            memory_mb=256, vcpu=1, disk=1, ephemeral=0,
            extra_spec={'hw:cpu_policy': 'dedicated'})

    def pinned(self, host):
        """The dedicated CPUs that the resource tracker counts."""
        self.periodic('update_available_resource', host)
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.host_mappings[host].cell_mapping) as context:
            node = objects.ComputeNode.get_first_node_by_host_for_old_compat(
                context, host)
        topology = objects.NUMATopology.obj_from_db_obj(node.numa_topology)
        return sorted(cpu for cell in topology.cells
                      for cpu in cell.pinned_cpus)

    def lose(self, host):
        """End the threads that follow migrations, as the end of their process
        would: without another word to anybody.
        """
        source = self.computes[host].driver._migration_source
        source._status = lambda job: sys.exit()
        self.wait_for(lambda: not source._jobs, 'the end of the thread')

    def lose_the_end(self, answer, times=1, meanwhile=lambda: None):
        """Who is asked for the destination's part of the end never says that
        it is done, as if its process were killed.

        :param answer: it is done before that
        :param times: how often
        :param meanwhile: what happens while an answer is waited for
        :returns: where the server was, as those were told that were asked
        """
        real = rpcapi.ComputeAPI.post_live_migration_at_destination
        asked = []

        def ask(api, context, instance, *args):
            asked.append(instance.host)
            lost = len(asked) <= times
            if answer or not lost:
                real(api, context, instance, *args)
            if lost:
                meanwhile()
                raise oslo_messaging.MessagingTimeout

        self.useFixture(fixtures.MonkeyPatch(
            'nova.compute.rpcapi.ComputeAPI.'
            'post_live_migration_at_destination', ask))
        return asked

    def host(self, server):
        return self.api.get_server(server['id'])['OS-EXT-SRV-ATTR:host']

    def wait_until_clean(self, host):
        self.wait_for(lambda: not self.agents.leftovers(host),
                      f'{host} is clean')


class InMemoryTestCase(TestCase):
    """The agents are in memory: two real ones in one network namespace cannot
    both have the interfaces of a server. With real ones see tests/cloud.
    """

    def setUp(self):
        self.useFixture(fixtures.MonkeyPatch(
            'tests.functional.agents.Agents', agents.InMemory))
        self.plugs = []
        super().setUp()
        self.one = self.agents.client('host1')
        self.two = self.agents.client('host2')
        self.addCleanup(self.one.proceed)
        self.addCleanup(self.two.proceed)
        # So that the certificates are in the database.
        for host in base.HOSTS:
            self.periodic('update_available_resource', host)

    def _plug(self, vif, info):
        self.plugs.append(('plug', vif.vif_name))

    def _unplug(self, vif, info):
        self.plugs.append(('unplug', vif.vif_name))

    def bindings(self, server):
        """Host → status of the bindings of the server's first port."""
        port = self.info(server, self.host(server))['nics'][0]['id']
        return {host: binding['status'] for host, binding in
                self.neutron._port_bindings[port].items()}

    def assert_at(self, server, host, state='running', status='ACTIVE'):
        """The server is there, and nowhere else is anything of it."""
        now = self.api.get_server(server['id'])
        self.assertEqual((host, status, None), (
            now['OS-EXT-SRV-ATTR:host'], now['status'],
            now['OS-EXT-STS:task_state']))
        self.assertEqual(state, self.info(server, host)['state'])
        for other in base.HOSTS:
            if other != host:
                self.wait_until_clean(other)
        self.assertEqual([host], self.allocations(server))
        self.wait_for(lambda: [*self.bindings(server)] == [host],
                      'bindings of one host')
        instance = self.instance(server, host)
        self.assertEqual(
            str(self.info(server, host)['base_id']),
            instance.system_metadata['pycontainer_base_id'])
        # Nova forgets them when it has done all else.
        self.wait_for(lambda: not any(
            compute.manager._pending_dest_live_migrations
            for compute in self.computes.values()), 'the end of them')
