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

from nova import context as nova_context
from nova import objects

from tests.functional import base


class TestCase(base.TestCase):

    def migrate(self, server, host='host2', status=202, **kwargs):
        return self.api.post_server_action(
            server['id'], {'os-migrateLive': {
                'host': host, 'block_migration': 'auto', **kwargs}},
            check_response_status=[status])

    def record(self, server):
        """The newest of its migrations, or None.

        Not through the API, which gathers them from all cells: that and the
        migration itself lock the fixtures' databases against each other.
        """
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.host_mappings['host1'].cell_mapping) as context:
            found = objects.MigrationList.get_by_filters(
                context, {'instance_uuid': server['id']})
        return max(found, key=lambda record: record.id, default=None)

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

    def host(self, server):
        return self.api.get_server(server['id'])['OS-EXT-SRV-ATTR:host']

    def wait_until_clean(self, host):
        self.wait_for(lambda: not self.agents.leftovers(host),
                      f'{host} is clean')
