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

"""The destination's nova-compute is away when a live migration ends."""

from unittest import mock

import fixtures
from nova import exception

from tests import cases
from tests.functional import migration_base


class HandoverTest(migration_base.InMemoryTestCase):

    def move(self, answer, times=1, **flavor):
        """:param answer: whether it is only the answer that is lost"""
        server = self.boot(**flavor)
        asked = self.lose_the_end(answer, times)
        self.migrate(server)
        return server, asked

    def assert_moved(self, server, asked):
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')
        self.assertEqual(['host1', 'host1'], asked)

    def test_before_it_has_begun(self):
        self.assert_moved(*self.move(False))

    def test_before_it_has_answered(self):
        self.assert_moved(*self.move(True))

    def test_it_fails(self):
        """As when Neutron does not answer for a moment."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.handover._PAUSE_S', 0.1))
        server = self.boot()
        manager = self.computes['host2'].manager
        with mock.patch.object(
                manager.driver, 'post_live_migration_at_destination',
                autospec=True, side_effect=[
                    exception.MigrationError(reason='it fails'), mock.DEFAULT],
                wraps=manager.driver.post_live_migration_at_destination):
            self.migrate(server)
            self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_it_does_not_come_back(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.handover._TRIES', 2))
        server, asked = self.move(False, times=2)
        self.wait_for_migration(server, 'error')
        self.assertEqual(['host1', 'host1'], asked)
        # Where it is, and can be evacuated from.
        now = self.api.get_server(server['id'])
        self.assertEqual(('host2', 'ERROR'), (
            now['OS-EXT-SRV-ATTR:host'], now['status']))

    @cases.more
    def test_cpus_were_claimed(self):
        flavor = self.dedicated_flavor()
        self.two._ids += 1 << 26
        self.boot(host='host2', flavorRef=flavor)
        server, asked = self.move(True, flavorRef=flavor)
        self.assert_moved(server, asked)
        cpu, = self.info(server, 'host2')['resources']['cpus']['cpus']
        self.assertEqual({0: cpu}, self.instance(
            server, 'host2').numa_topology.cells[0].cpu_pinning)
        self.assertEqual([], self.pinned('host1'))
        self.assertEqual([0, 1], self.pinned('host2'))
