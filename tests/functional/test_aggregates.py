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

"""What an operator says of a host stays as he has said it."""

import uuid

from tests.functional import base

TRAIT = 'CUSTOM_RACK_SEVEN'
ZONE = 'zone7'


class AggregatesTest(base.TestCase):

    def setUp(self):
        super().setUp()
        self.node = self._get_provider_uuid_by_host('host1')
        self.aggregate = self._create_aggregate('rack', ZONE)
        self.admin_api.post_aggregate_action(self.aggregate, {
            'add_host': {'host': 'host1'}})
        self.admin_api.post_aggregate_action(self.aggregate, {
            'set_metadata': {'metadata': {'ssd': 'true', 'rack': '7'}}})
        # And one of Placement's alone, beside Nova's mirror of its own.
        url = f'/resource_providers/{self.node}/aggregates'
        now = self.placement.get(url, version='1.19').body
        self.placement.put(url, {
            'aggregates': [*now['aggregates'], str(uuid.uuid4())],
            'resource_provider_generation': now[
                'resource_provider_generation']}, version='1.19')
        self._create_trait(TRAIT)
        self._set_provider_traits(
            self.node, [*self._get_provider_traits(self.node), TRAIT])

    def said(self):
        found = {
            key: value for key, value in self.admin_api.api_get(
                f'os-aggregates/{self.aggregate}').body[
                    'aggregate'].items() if key != 'updated_at'}
        return found, sorted(self._get_provider_aggregates(self.node)), (
            TRAIT in self._get_provider_traits(self.node)), self.service()[
                'zone']

    def assert_ours_again(self):
        """The driver has updated the provider meanwhile."""
        self.assertIn('CUSTOM_PYCONTAINER',
                      self._get_provider_traits(self.node))
        self.assertIn('VCPU', self._get_provider_inventory(self.node))

    def without_ours(self):
        """So that the driver has something to update."""
        self._set_provider_traits(self.node, [
            trait for trait in self._get_provider_traits(self.node)
            if trait != 'CUSTOM_PYCONTAINER'])
        self.assertNotIn('CUSTOM_PYCONTAINER',
                         self._get_provider_traits(self.node))
        self.computes['host1'].manager.reportclient.clear_provider_cache()

    def test_untouched(self):
        before = self.said()
        aggregate, in_placement, trait, zone = before
        self.assertEqual(['host1'], aggregate['hosts'])
        self.assertEqual(
            {'ssd': 'true', 'rack': '7', 'availability_zone': ZONE},
            aggregate['metadata'])
        self.assertIn(aggregate['uuid'], in_placement)
        self.assertEqual(2, len(in_placement))
        self.assertTrue(trait)
        self.assertEqual(ZONE, zone)
        server = self.boot(host=None, availability_zone=ZONE)
        self.assertEqual('host1', server['OS-EXT-SRV-ATTR:host'])

        self.without_ours()
        self.periodic('update_available_resource')
        self.assert_ours_again()
        self.assertEqual(before, self.said())

        self.without_ours()
        self.restart()
        self.wait_for(lambda: self.service()['state'] == 'up', 'the service')
        self.periodic('update_available_resource')
        self.assert_ours_again()
        self.assertEqual(before, self.said())

        # A host that is taken out of scheduling and back, by the driver.
        self.restart_agent('host1')
        self.periodic('update_available_resource')
        self.assertEqual(before, self.said())
        self.assertNotIn(
            'COMPUTE_STATUS_DISABLED', self._get_provider_traits(self.node))

        # And a disabled one remains that, with all of it.
        self.admin_api.put_service(self.service()['id'], {
            'status': 'disabled', 'disabled_reason': 'a new disk'})
        self.restart()
        self.periodic('update_available_resource')
        self.assertEqual(('disabled', 'a new disk'), tuple(
            self.service()[key] for key in ('status', 'disabled_reason')))
        self.assertEqual(before, self.said())
        self.assertEqual(ZONE, self.api.get_server(server['id'])[
            'OS-EXT-AZ:availability_zone'])
