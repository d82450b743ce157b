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

import sys
import threading
from unittest import mock

import fixtures
from nova import context as nova_context
from nova import exception

from tests import cases
from tests.functional import base
from tests.functional import migration_base


class HandoverTest(migration_base.InMemoryTestCase):

    def setUp(self):
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.handover._PAUSE_S', 0.1))

    def move(self, answer, times=1, meanwhile=None, **values):
        """:param answer: whether it is only the answer that is lost"""
        server = self.boot(**values)
        asked = self.lose_the_end(
            answer, times, lambda: meanwhile and meanwhile(server))
        self.migrate(server)
        return server, asked

    def assert_moved(self, server):
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_before_it_has_begun(self):
        server, asked = self.move(False)
        self.assert_moved(server)
        self.assertEqual(['host1', 'host1'], asked)

    def test_before_it_has_answered(self):
        server, asked = self.move(True)
        self.assert_moved(server)
        self.assertEqual(['host1'], asked)

    def test_it_fails(self):
        """As when Neutron does not answer for a moment."""
        server = self.boot()
        manager = self.computes['host2'].manager
        with mock.patch.object(
                manager.network_api, 'migrate_instance_finish', autospec=True,
                side_effect=[exception.PortUpdateFailed(
                    port_id='it', reason='it fails'), mock.DEFAULT],
                wraps=manager.network_api.migrate_instance_finish):
            self.migrate(server)
            self.assert_moved(server)

    def test_it_does_not_come_back(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.handover._LONGEST_S', 0))
        server, asked = self.move(False, times=2)
        self.wait(server, 'ERROR')
        self.wait_for(lambda: self.record(server).status == 'error', 'it')
        self.assertEqual(['host1', 'host1'], asked)
        # Where it is, and can be evacuated from.
        now = self.api.get_server(server['id'])
        self.assertEqual('host2', now['OS-EXT-SRV-ATTR:host'])
        self.assertIn('set the state of the server to active',
                      now['fault']['message'])
        self.assertEqual(['host2'], self.allocations(server))
        self.assertIsNone(self.held(server))

    def held(self, server):
        """What its last migration holds."""
        return self._get_allocations_by_server_uuid(
            self.record(server).uuid) or None

    def test_moved_back_meanwhile(self):
        """Nobody takes away what has come back."""
        # The services share one pool here.
        self.flags(max_concurrent_live_migrations=2)
        gone_on = threading.Event()
        self.addCleanup(gone_on.set)
        server, asked = self.move(True, meanwhile=lambda server: (
            gone_on.wait(60)))
        self.wait_for(lambda: self.host(server) == 'host2', 'it to move')
        self.wait_for_task(server, None)
        self.migrate(server, 'host1')
        self.wait_for(lambda: self.host(server) == 'host1', 'it to come back')
        gone_on.set()
        self.wait_for(lambda: {
            record.status for record in self.records(server)} == {
                'completed'}, 'both to be completed')
        self.assertEqual(['host1', 'host2'], asked)
        self.assert_at(server, 'host1')

    def test_used_meanwhile(self):
        def use(server):
            for verb, status in (('suspend', 'SUSPENDED'),
                                 ('resume', 'ACTIVE'), ('pause', 'PAUSED')):
                self.action(server, status, verb)

        server, asked = self.move(True, meanwhile=use)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2', 'paused', 'PAUSED')
        self.assertEqual(['host1'], asked)
        self.action(server, 'ACTIVE', 'unpause')

    def test_deleted_meanwhile(self):
        """Nova asks the source, which has it still, or the destination."""
        for answer in False, True:
            server, asked = self.move(answer, meanwhile=lambda server: (
                self.api.delete_server(server['id'])))
            record = self.wait_for(lambda s=server: self.record(s), 'it')
            self._wait_until_deleted(server)
            for host in base.HOSTS:
                self.wait_until_clean(host)
            for uuid in record.uuid, server['id']:
                self.wait_for(lambda u=uuid: (
                    not self._get_allocations_by_server_uuid(u)),
                    'its allocations to go')

    def test_nova_compute_dies_meanwhile(self):
        """The source's, after the destination has recorded it."""
        server, asked = self.move(True, meanwhile=lambda server: sys.exit())
        self.wait_for(lambda: self.host(server) == 'host2', 'it to move')
        self.wait_for(lambda: asked, 'the death')
        self.assertIsNotNone(self.held(server))
        self.restart('host1')
        self.wait_for_migration(server, 'completed')
        self.wait_for(lambda: not self.held(server), 'its allocation to go')
        self.assert_at(server, 'host2')

    def test_record_that_was_not_closed(self):
        """It says nothing of the next migration."""
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        record = self.record(server)
        record.status = 'running'
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.host_mappings['host1'].cell_mapping) as context:
            record._context = context
            record.save()
        self.two.hold('copying')
        self.migrate(server, 'host1')
        self.two.wait_for_phase('copying')
        self.lose('host2')
        self.restart('host2')
        self.two.proceed()
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host1')
        self.restart('host1')
        self.wait_for(lambda: {
            record.status for record in self.records(server)} == {
                'completed'}, 'both to be completed')

    def test_a_restart_has_given_it_up(self):
        """The request comes late, and the server is used already."""
        server = self.boot()
        manager = self.computes['host1'].manager
        real = manager.driver._migration_source._begun

        def begun(context, job, *args):
            instance = self.instance(server)
            instance.task_state = None
            instance.save()
            self.action(server, 'SUSPENDED', 'suspend')
            return real(context, job, *args)

        with mock.patch.object(manager.driver._migration_source, '_begun',
                               autospec=True, side_effect=begun):
            self.migrate(server)
            self.wait_for_migration(server, 'failed')
        self.assertIn('Ask for it again', self.reason(server))
        self.assert_at(server, 'host1', 'suspended', 'SUSPENDED')
        self.action(server, 'ACTIVE', 'resume')

    @cases.more
    def test_cpus_were_claimed(self):
        flavor = self.dedicated_flavor()
        self.two._ids += 1 << 26
        self.boot(host='host2', flavorRef=flavor)
        pinned = []
        server, asked = self.move(
            False, flavorRef=flavor, meanwhile=lambda server: pinned.append(
                [self.pinned(host) for host in base.HOSTS]))
        self.assert_moved(server)
        self.assertEqual([[[0], [0, 1]]], pinned)
        cpu, = self.info(server, 'host2')['resources']['cpus']['cpus']
        self.assertEqual({0: cpu}, self.instance(
            server, 'host2').numa_topology.cells[0].cpu_pinning)
        self.assertEqual([], self.pinned('host1'))
        self.assertEqual([0, 1], self.pinned('host2'))
