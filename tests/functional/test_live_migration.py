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

"""Live migration through Nova's API, conductor and compute managers.

The agents are in memory: two real ones in one network namespace cannot both
have the interfaces of a server. With real ones see tests/cloud.
"""

import time
from unittest import mock

import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects

from nova_pycontainer import driver
from nova_pycontainer import migration
from nova_pycontainer import migration_checks
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import state
from tests import cases
from tests.functional import base
from tests.functional import migration_base
from tests.unit.driver import fake_migration


class LiveMigrationTest(migration_base.InMemoryTestCase):

    # Success

    def test_there_and_back(self):
        server = self.boot()
        before = self.info(server)
        self.migrate(server)
        now = self.wait_for_migration(server, 'completed')
        self.assertEqual(power_state.RUNNING, now['OS-EXT-STS:power_state'])
        self.assert_at(server, 'host2')
        after = self.info(server, 'host2')
        for same in ('base_id', 'layer', 'name', 'resources', 'nics'):
            self.assertEqual(before[same], after[same], same)

        self.migrate(server, 'host1')
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host1')
        # The image's layer was here all the time.
        self.assertEqual(1, self.agents.imports('host1'))
        name = before['nics'][0]['devname']
        self.assertEqual(
            [('plug', name), ('plug', name), ('unplug', name),
             ('plug', name), ('unplug', name)], self.plugs)
        self.delete(server)
        self.assert_nothing_left('host1')
        self.assert_nothing_left('host2')

    def test_scheduler_chooses(self):
        server = self.boot()
        self.migrate(server, None)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_block_migration(self):
        server = self.boot()
        self.migrate(server, block_migration=True)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_paused(self):
        server = self.boot()
        self.action(server, 'PAUSED', 'pause')
        self.migrate(server)
        now = self.wait_for_migration(server, 'completed')
        self.assertEqual(power_state.PAUSED, now['OS-EXT-STS:power_state'])
        self.assert_at(server, 'host2', 'paused', 'PAUSED')
        self.action(server, 'ACTIVE', 'unpause')

    def test_life_goes_on(self):
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        self.assert_at(server, 'host2')

    def test_options_of_the_operator(self):
        self.flags(group='pycontainer', live_migration_bandwidth=20,
                   live_migration_downtime=300,
                   live_migration_permit_post_copy=True)
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        wanted = {'bandwidth': 20 << 20, 'max_downtime': 0.3,
                  'permit_post_copy': True}
        self.assertEqual(wanted, self.one.begun[0][2])
        self.assertEqual(wanted, self.two.prepared[0][2])

    def test_each_knows_the_other_by_its_certificate(self):
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        (migration_uuid, source, _options), = self.two.prepared
        self.assertEqual(self.one.certificate, source['certificate'])
        (same_uuid, endpoint, _options), = self.one.begun
        self.assertEqual(self.two.certificate, endpoint['certificate'])
        self.assertEqual(self.two.port, endpoint['port'])
        self.assertEqual(migration_uuid, same_uuid)
        self.assertEqual(self.record(server).uuid, migration_uuid)

    def test_leftover_of_an_earlier_stay(self):
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        # As if the source's agent had been gone when Nova cleaned up.
        self.one.containers[server['id']] = {
            **self.info(server, 'host2'), 'state': 'stopped', 'moved': True}
        self.migrate(server, 'host1')
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host1')

    def test_progress(self):
        server = self.boot()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration._SAVE_S', 0.0))
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')

        def shown():
            running = self.api.api_get(
                f'/servers/{server["id"]}/migrations').body['migrations']
            return (running and running[0]['memory_processed_bytes'] and
                    running[0])

        record = self.wait_for(shown, 'progress')
        self.assertEqual('running', record['status'])
        self.assertEqual(64 << 20, record['memory_total_bytes'])
        self.assertEqual(1 << 20, record['memory_processed_bytes'])
        self.assertEqual(63 << 20, record['memory_remaining_bytes'])
        self.assertEqual(1 << 10, record['disk_processed_bytes'])
        self.assertIsNone(record['disk_total_bytes'])
        self.wait_for(lambda: self.api.get_server(
            server['id']).get('progress') == 1, 'progress of the server')
        self.one.proceed()
        self.wait_for_migration(server, 'completed')

    # Refusals

    def assert_refused(self, server, words):
        self.wait_for_migration(server, 'error')
        self.assertIn(words, self.reason(server))
        self.assert_at(server, 'host1')

    @cases.more
    def test_no_shared_storage(self):
        server = self.boot()
        self.migrate(server, block_migration=False)
        self.assert_refused(server, 'not on shared storage')

    @cases.more
    def test_other_protocol(self):
        server = self.boot()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.host.HYPERVISOR_VERSION', 2))
        self.periodic('update_available_resource', 'host2')
        self.migrate(server)
        self.assert_refused(
            server, 'host1 speaks version 1 of the migration protocol, host2 '
            'speaks version 2. Upgrade nova-pycontainer on host1')

    def test_destination_of_a_former_release(self):
        self.two.state_format = None
        server = self.boot()
        self.migrate(server)
        self.assert_refused_format(server, 'host2')
        # Its driver is of that release too, and asks nobody; the source's
        # is not.
        check = migration_checks.Checks._check_formats

        def of_the_source(source, source_name, destination, name):
            if name != 'host2':
                check(source, source_name, destination, name)

        self.useFixture(fixtures.MockPatchObject(
            migration_checks.Checks, '_check_formats',
            staticmethod(of_the_source)))
        server = self.boot()
        self.migrate(server)
        self.assert_refused_format(server, 'the destination')
        self.assertIn('to host host2', self.reason(server))

    def assert_refused_format(self, server, there):
        self.assert_refused(
            server, f'host1 keeps instances in format {state.FORMAT}, '
            f'{there} in format 3')
        self.assertIn(f'Upgrade nova-pycontainer on {there} first',
                      self.reason(server))
        for agent in (self.one, self.two):
            self.assertNotIn('migration_check_source', agent.calls)
            self.assertNotIn('migration_prepare', agent.calls)

    @cases.more
    def test_source_of_a_later_release(self):
        self.one.state_format = state.FORMAT + 1
        self.periodic('update_available_resource', 'host1')
        server = self.boot()
        self.migrate(server)
        self.assert_refused(
            server, f'host1 keeps instances in format {state.FORMAT + 1}')
        self.assertNotIn('migration_check_source', self.one.calls)

    def test_source_of_a_former_release(self):
        self.one.state_format = None
        self.periodic('update_available_resource', 'host1')
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_ids_in_use(self):
        server = self.boot()
        other = self.boot(host='host2')
        self.two.containers[other['id']]['base_id'] = self.info(
            server)['base_id']
        self.migrate(server)
        self.wait_for_migration(server, 'error')
        self.assertIn(f'belong to {other["id"]}', self.reason(server))

    def test_source_cannot(self):
        server = self.boot()
        self.one.source_problems.append(fake_migration.problem(
            'ptrace', 'it is traced by a debugger', 'End the debugger',
            process='gdb (pid 4)'))
        self.migrate(server)
        self.assert_refused(
            server, 'gdb (pid 4): it is traced by a debugger. End the '
            'debugger')

    def test_destination_cannot(self):
        server = self.boot()
        self.two.destination_problems.append(fake_migration.problem(
            'disk', 'there is no room', 'Free space'))
        self.migrate(server)
        self.assert_refused(server, 'there is no room. Free space')

    @cases.more
    def test_warnings_do_not_matter(self):
        server = self.boot()
        for agent in (self.one, self.two):
            agent.warnings.append(fake_migration.problem(
                'kernel', 'it is older', 'Upgrade it'))
        self.migrate(server)
        self.wait_for_migration(server, 'completed')

    @cases.more
    def test_image_is_gone(self):
        server = self.boot()
        self.glance.delete(None, self.image)
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')
        self.assertEqual(0, self.agents.imports('host2'))

    def test_image_is_gone_but_the_layer_is_there(self):
        server = self.boot()
        self.delete(self.boot(host='host2'))
        self.glance.delete(None, self.image)
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_destination_without_agent(self):
        server = self.boot()
        self.two.failures['host_info'] = errors.AgentUnavailable(
            'agent_unavailable', 'the agent does not answer')
        self.migrate(server)
        self.assert_refused(server, 'the agent does not answer')

    def test_destination_that_is_lost(self):
        server = self.boot()
        self.two.down = True
        self.wait_for(lambda: self.service('host2')['status'] == 'disabled',
                      'host2 is taken out')
        self.migrate(server)
        # It is the scheduler's answer.
        self.assert_refused(server, 'No valid host')

    # Failures

    def test_prepare_fails(self):
        server = self.boot()
        self.two.failures['migration_prepare'] = errors.ContainerError(
            'no_space', 'no space is left', uuid=server['id'],
            step='define', cause='write: ENOSPC')
        self.migrate(server)
        self.wait_for_migration(server, 'error', 'failed')
        self.assertIn('no space is left', self.reason(server))
        self.assert_at(server, 'host1')
        del self.two.failures['migration_prepare']
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_plug_fails(self):
        server = self.boot()

        def fail(vif, info):
            raise exception.VirtualInterfacePlugException('switch is off')

        with fixtures.MonkeyPatch('os_vif.plug', fail):
            self.migrate(server)
            self.wait_for_migration(server, 'error', 'failed')
        self.assertIn('switch is off', self.reason(server))
        self.assert_at(server, 'host1')

    def test_begin_fails(self):
        server = self.boot()
        self.one.failures['migration_begin'] = errors.ContainerError(
            'bad_state', 'the source does not want to', uuid=server['id'])
        self.migrate(server)
        self.wait_for_migration(server, 'failed')
        self.assertIn('the source does not want to', self.reason(server))
        self.assert_at(server, 'host1')

    def test_restore_fails(self):
        server = self.boot()
        self.two.restore_error = errors.ContainerError(
            'criu_failed', 'the instance cannot be restored',
            uuid=server['id'], step='restore', cause='no such device',
            remedy='Run "pycontainer preflight" on both hosts')
        self.migrate(server)
        self.wait_for_migration(server, 'failed')
        self.assertIn('the instance cannot be restored: no such device',
                      self.reason(server))
        self.assert_at(server, 'host1')
        self.two.restore_error = None
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    @cases.more
    def test_foreign_certificate(self):
        server = self.boot()
        # Someone else listens where the destination's agent should.
        self.two.certificate = 'another'
        self.migrate(server)
        self.wait_for_migration(server, 'failed')
        self.assertIn('another certificate', self.reason(server))
        self.assert_at(server, 'host1')

    def test_never_removed_where_it_runs(self):
        server = self.boot()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        driver = self.computes['host2'].driver
        instance = self.instance(server, 'host2')
        for data in (
                objects.LibvirtLiveMigrateData(),
                migration.migration_data.create(
                    None, None, None,
                    migration=self.record(server).uuid)):
            self.assertRaises(
                exception.MigrationError,
                driver.rollback_live_migration_at_destination, None,
                instance, [], {}, migrate_data=data)
        self.assert_at(server, 'host2')

    # Control

    def abort(self, server, status=202):
        self.api.api_delete(
            f'/servers/{server["id"]}/migrations/'
            f'{self.record(server).id}', check_response_status=[status])

    def test_abort(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.abort(server)
        self.wait_for_migration(server, 'cancelled')
        self.assertIn('aborted by the operator', self.reason(server))
        self.assert_at(server, 'host1')
        self.one.proceed()
        self.migrate(server)
        self.wait_for_migration(server, 'completed')

    def test_abort_too_late(self):
        server = self.boot()
        self.one.hold('committed')
        self.migrate(server)
        self.one.wait_for_phase('committed')
        self.abort(server)
        self.wait_for(lambda: 'point of no return' in self.reason(server),
                      'the refusal')
        self.one.proceed()
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_force_complete(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.api.force_complete_migration(
            server['id'], self.record(server).id)
        self.wait_for_migration(server, 'completed')
        self.assertIn('migration_force_complete', self.one.calls)
        self.assert_at(server, 'host2')

    @cases.more
    def test_nothing_to_control(self):
        server = self.boot()
        driver = self.computes['host1'].driver
        for method in (driver.live_migration_abort,
                       driver.live_migration_force_complete):
            self.assertRaises(exception.NoActiveMigrationForInstance,
                              method, self.instance(server))

    def test_late_is_aborted(self):
        server = self.boot()
        self.one.hold('copying')
        # 2 GiB of memory at least and 1 GiB of disk.
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration.Source._time_limit',
            lambda source, instance: 0.5))
        self.migrate(server)
        self.wait_for_migration(server, 'cancelled')
        self.assertIn('has not completed within', self.reason(server))
        self.assert_at(server, 'host1')

    @cases.more
    def test_late_is_forced(self):
        self.flags(live_migration_timeout_action='force_complete',
                   group='pycontainer')
        server = self.boot()
        self.one.hold('copying')
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration.Source._time_limit',
            lambda source, instance: 0.5))
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_deleted_meanwhile(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.delete(server)
        for host in base.HOSTS:
            self.wait_until_clean(host)
        self.wait_for(
            lambda: len([kind for kind, _name in self.plugs
                         if kind == 'unplug']) == 2, 'ports unplugged')

    # Restarts

    def test_nova_compute_restarts_while_it_copies(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.lose('host1')
        self.restart('host1')
        self.assertEqual('MIGRATING', self.api.get_server(
            server['id'])['status'])
        self.one.proceed()
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    def test_nova_compute_restarts_and_it_has_moved(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.lose('host1')
        self.one.proceed()
        self.one.wait_for_phase('completed')
        self.restart('host1')
        self.wait_for_migration(server, 'completed')
        self.assert_at(server, 'host2')

    @cases.more
    def test_nova_compute_restarts_and_it_has_failed(self):
        self.two.restore_error = errors.ContainerError(
            'criu_failed', 'it cannot be restored')
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.lose('host1')
        self.one.proceed()
        self.one.wait_for_phase('failed')
        self.restart('host1')
        self.wait_for_migration(server, 'failed')
        self.assert_at(server, 'host1')

    def test_nova_compute_restarts_and_it_is_aborted(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.lose('host1')
        self.restart('host1')
        self.wait_for(lambda: server['id'] in self.computes[
            'host1'].driver._migration_source._jobs, 'it is followed')
        self.abort(server)
        self.wait_for_migration(server, 'cancelled')
        self.assert_at(server, 'host1')

    def restart_with_claimed_cpus(self, error, status):
        """:returns: where the server is, and what is pinned there"""
        flavor = self.dedicated_flavor()
        self.two._ids += 1 << 26
        self.boot(host='host2', flavorRef=flavor)
        server = self.boot(flavorRef=flavor)
        self.two.restore_error = error
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.assertEqual([0, 1], self.pinned('host2'))
        self.lose('host1')
        self.one.proceed()
        # A slow start: nothing may go on before the resource tracker can.
        with mock.patch.object(
                driver.PyContainerDriver, 'get_host_uptime', autospec=True,
                side_effect=lambda *_: time.sleep(1) or 'load average: 9'):
            self.restart('host1')
        self.wait_for_migration(server, status)
        host = self.host(server)
        self.assertEqual([host], self.allocations(server))
        cpu, = self.info(server, host)['resources']['cpus']['cpus']
        self.assertEqual({0: cpu}, self.instance(
            server, host).numa_topology.cells[0].cpu_pinning)
        return host, cpu, self.pinned('host1'), self.pinned('host2')

    def test_nova_compute_restarts_and_cpus_were_claimed(self):
        self.assertEqual(
            ('host2', 1, [], [0, 1]),
            self.restart_with_claimed_cpus(None, 'completed'))

    @cases.more
    def test_nova_compute_restarts_and_cpus_were_claimed_in_vain(self):
        self.assertEqual(
            ('host1', 0, [0], [0]), self.restart_with_claimed_cpus(
                errors.ContainerError('criu_failed', 'it fails'), 'failed'))

    def test_agent_restarts(self):
        server = self.boot()
        self.one.hold('copying')
        self.migrate(server)
        self.one.wait_for_phase('copying')
        self.one.down = True
        self.one.forget_migrations()
        self.two.forget_migrations()
        self.one.down = False
        self.wait_for_migration(server, 'failed')
        self.assertIn('ended with the agent', self.reason(server))
        self.assert_at(server, 'host1')
