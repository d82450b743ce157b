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


"""Ports that Neutron guarantees a bandwidth, by a QoS policy.

Placement has it as resources of the switch's bridge, a provider below the
compute node that Neutron makes. Nova claims them; the driver has to leave
these providers alone.
"""

import uuid

import fixtures

from tests.functional import agents
from tests.functional import base
from tests.functional import migration_base

_TRAITS = ['CUSTOM_VNIC_TYPE_NORMAL', 'CUSTOM_PHYSNET2']


class Base(migration_base.TestCase):

    def setUp(self):
        super().setUp()
        self.port = self.neutron.port_with_resource_request
        self.wanted = self.port['resource_request']['resources']
        for trait in _TRAITS:
            self._create_trait(trait)
        for host in base.HOSTS:
            # What the Open vSwitch agent reports.
            agent = self.provider(
                'agent', host, self._get_provider_uuid_by_host(host), {})
            self.provider('bridge', host, agent, {
                name: {'total': amount} for name, amount
                in self.wanted.items()})
            self.periodic('update_available_resource', host)

    def bridge(self, host):
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, f'bridge of {host}'))

    def provider(self, kind, host, parent, inventories):
        made = str(uuid.uuid5(uuid.NAMESPACE_DNS, f'{kind} of {host}'))
        self.placement.post('/resource_providers', version='1.20', body={
            'name': f'{host}:{kind}', 'uuid': made,
            'parent_provider_uuid': parent})
        if inventories:
            self._update_inventory(made, {
                'inventories': inventories,
                'resource_provider_generation': 0})
            self._set_provider_traits(made, _TRAITS)
        return made

    def boot(self, **values):
        return super().boot(networks=[{'port': self.port['id']}], **values)

    def assert_claimed(self, server, host):
        found = self._get_allocations_by_server_uuid(server['id'])
        self.assertEqual(
            {self._get_provider_uuid_by_host(host), self.bridge(host)},
            {*found})
        self.assertEqual(self.wanted, found[self.bridge(host)]['resources'])
        # Neutron learns which bridge it is.
        binding = self.neutron._ports[self.port['id']]['binding:profile']
        self.assertEqual(self.bridge(host), binding['allocation'])
        nic, = self.info(server, host)['nics']
        self.assertEqual(self.port['id'], nic['id'])
        # The tracker's next round takes nothing away.
        self.periodic('update_available_resource', host)
        self.assertEqual(
            {*self.wanted}, {*self._get_provider_inventory(
                self.bridge(host))})

    def wait_until_free(self, host):
        """Nova says that a server is moved or deleted, and gives its
        resources back afterwards.
        """
        self.wait_for(
            lambda: not self._get_allocations_by_provider_uuid(
                self.bridge(host)), f'the bridge of {host} to be free')


class PortsTest(Base):
    """With agents as they are."""

    def test_create_migrate_and_delete(self):
        server = self.boot()
        self.assert_claimed(server, 'host1')
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.assert_claimed(server, 'host2')
        self.action(server, 'ACTIVE', 'confirmResize')
        self.wait_until_free('host1')
        self.delete(server)
        self.wait_until_free('host2')
        self.assert_nothing_left('host2')

    def test_no_bandwidth_is_left(self):
        name, amount = next(iter(self.wanted.items()))
        other = {**self.port, 'resource_request': {
            **self.port['resource_request'],
            'resources': {**self.wanted, name: amount + 1}}}
        self.neutron._ports[self.port['id']] = other
        server = super().boot(status='ERROR')
        self.assertIn('No valid host', server['fault']['message'])
        self.delete(server)
        self.wait_until_free('host1')
        self.assert_nothing_left()


class LiveMigrationTest(Base):
    """With agents in memory: two real ones in one network namespace cannot
    both have the interface.
    """

    def setUp(self):
        self.useFixture(fixtures.MonkeyPatch(
            'tests.functional.agents.Agents', agents.InMemory))
        super().setUp()

    def test_live_migration(self):
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_claimed(server, 'host2')
        self.wait_until_free('host1')
        self.delete(server)
        self.wait_until_free('host2')
