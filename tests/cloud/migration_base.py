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

"""What tests look at that migrate servers of the cloud."""

import typing

from tests.cloud import base

#: Ends what hangs; nothing is measured by it.
PATIENCE = 120.0


class MigrationTestCase(base.CloudTestCase):

    def migrations(self, server: typing.Any) -> list[typing.Any]:
        """All of its migrations, the newest first."""
        return sorted(
            self.admin.compute.migrations(instance_uuid=server.id),
            key=lambda migration: migration.id, reverse=True)

    def wait_migration(self, server: typing.Any, *statuses: str
                       ) -> typing.Any:
        def reached():
            found = self.migrations(server)
            if not found:
                return None
            if found[0].status in statuses:
                return found[0]
            if found[0].status in ('completed', 'failed', 'cancelled'):
                self.fail(f'the migration is {found[0].status}: '
                          f'{self.reasons(server)}')
            return None

        return base.wait_for(reached, PATIENCE, f'the migration is {statuses}')

    def reasons(self, server: typing.Any) -> str:
        """What its actions say of what failed, the newest first."""
        said = []
        for action in self.admin.compute.server_actions(server):
            # Since this version users see why.
            answer = self.admin.compute.get(
                f'/servers/{server.id}/os-instance-actions/'
                f'{action.request_id}', microversion='2.84')
            said += [str(event['details'])
                     for event in answer.json()['instanceAction']['events']
                     if event['result'] == 'Error']
        return '\n'.join(said)

    def wait_gone_from(self, host: str, server: typing.Any,
                       timeout: float = PATIENCE) -> None:
        base.wait_for(lambda: server.id not in self.containers(host),
                      timeout, f'the container has gone from {host}')

    def assert_at(self, server: typing.Any, host: str,
                  status: str = 'ACTIVE') -> None:
        """It is there, whole, and nothing of it is anywhere else."""
        now = self.wait_server(server.id, status)
        self.assertEqual(host, now.compute_host)
        state = 'paused' if status == 'PAUSED' else 'running'
        self.assertEqual(state, self.containers(host)[server.id]['state'])
        port = next(self.admin.network.ports(device_id=server.id))
        self.assertEqual(host, port.binding_host_id)
        name = f'tap{port.id[:11]}'
        for other in base.HOSTS:
            if other == host:
                self.assertIn(name, self.switch_ports(other))
                continue
            self.wait_gone_from(other, server)
            base.wait_for(
                lambda other=other: name not in self.switch_ports(other),
                PATIENCE, f'the port has gone from {other}')
            self.assertNotIn(name, self.on_host(
                other, 'ip', '-brief', 'link'))
        provider = self.hypervisor(host)
        self.assertEqual([provider], [*self.allocations(server)])

    def allocations(self, server: typing.Any) -> dict[str, typing.Any]:
        """By resource provider."""
        return self.admin.placement.get(
            f'/allocations/{server.id}').json()['allocations']

    def hypervisor(self, host: str) -> str:
        """Its id, which is its resource provider's too."""
        found, = self.admin.compute.get(
            f'/os-hypervisors?hypervisor_hostname_pattern={host}',
            microversion='2.53').json()['hypervisors']
        return found['id']

    def switch_ports(self, host: str) -> list[str]:
        return self.on_host(
            host, 'ovs-vsctl', 'list-ports', 'br-int').split()

    def restart_compute(self, host: str) -> None:
        """Restart nova-compute, and wait until it takes requests.

        Nova puts a server into ERROR that is being built while it starts.
        """
        self.restart(f'{host}.nova-compute')
        self.wait_compute(host)

    def wait_compute(self, host: str) -> None:
        hypervisor = self.hypervisor(host)

        def answers():
            # nova-compute itself is asked, which answers when it has begun.
            return self.admin.compute.get(
                f'/os-hypervisors/{hypervisor}/uptime',
                microversion='2.53').status_code == 200

        base.wait_for(answers, PATIENCE, f'nova-compute of {host} is ready')
