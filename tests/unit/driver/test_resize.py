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


import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import arrival
from nova_pycontainer import migration_data
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions
from tests.unit.driver import base
from tests.unit.driver import driver_base


class TestCase(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.spawn()
        self.record = objects.Migration(
            id=5, uuid=uuids.migration, source_compute='host1',
            dest_compute='host2')
        self.instance.save = lambda: None
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.arrival.record_of',
            lambda context, instance: self.record))
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration_data.recorded_identity',
            lambda context, host: {**self.peer, 'certificate': host}))
        self.peer = versions.own()


class LeaveTestCase(TestCase):
    """Of a server that may be resized, on its source."""

    def setUp(self):
        super().setUp()
        self.others = []
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.InstanceList.get_by_host', staticmethod(
                lambda context, host, expected_attrs: self.others)))

    def leave(self, **values):
        return self.driver.migrate_disk_and_power_off(
            self.context, self.instance, '192.0.2.2',
            base.make_flavor(**values), self.network_info, None, 60, 0)

    def refused(self, **values):
        error = self.assertRaises(
            exception.InstanceFaultRollback, self.leave, **values)
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertEqual(2, len(self.plugged))
        return error.inner_exception

    def test_it_is_offered_to_its_new_host(self):
        told = migration_data.load_disk_info(self.leave(root_gb=12))
        self.assertFalse(told['here'])
        self.assertEqual('host2', told['facts']['to']['certificate'])
        self.assertEqual(power_state.SHUTDOWN, self.state())
        self.assertEqual({}, self.plugged)

    def test_on_one_host(self):
        self.record.dest_compute = 'host1'
        told = migration_data.load_disk_info(self.leave())
        self.assertTrue(told['here'])
        self.assertNotIn('transfer_offer', self.agent.calls)

    def test_smaller_disk(self):
        self.agent.containers[uuids.instance]['resources'][
            'disk_bytes'] = 8 << 30
        self.assertIn('smaller', str(self.refused(root_gb=7)))
        self.assertNotIn('stop', self.agent.calls)

    def test_disk_of_any_size_on_one_host(self):
        self.record.dest_compute = 'host1'
        self.agent.containers[uuids.instance]['disk'] = {'method': 'loop'}
        self.assertIn('any size', str(self.refused(root_gb=0)))
        self.agent.containers[uuids.instance]['disk'] = {'method': 'project'}
        self.leave(root_gb=0)

    def test_disk_without_a_limit_on_one_host(self):
        self.record.dest_compute = 'host1'
        item = self.agent.containers[uuids.instance]
        item['resources']['disk_bytes'] = None
        for method in ('loop', 'project'):
            item['disk'] = {'method': method}
            self.assertIn('any size', str(self.refused(root_gb=20)))
        item['disk'] = {'method': 'none'}
        self.leave(root_gb=20)

    def test_rest_of_what_has_not_all_come(self):
        self.leave()
        self.agent.containers[uuids.instance].update(
            offered=None, incoming=uuids.migration)
        self.driver.power_on(self.context, self.instance, self.network_info)
        self.assertIn('transfer_resume', self.agent.calls)
        self.assertEqual(uuids.migration, arrival.came(self.instance))
        self.assertEqual(power_state.RUNNING, self.state())

    def test_flavor_that_containers_cannot_have(self):
        self.assertIn('quota:disk_total_bytes_sec', str(self.refused(
            extra_specs={'quota:disk_total_bytes_sec': '1'})))

    def test_nesting(self):
        self.assertIn('pycontainer:nesting', str(self.refused(
            extra_specs={'pycontainer:nesting': 'perhaps'})))
        for level, nested in (('enabled', True), ('disabled', False)):
            self.instance.flavor.extra_specs['pycontainer:nesting'] = level
            self.driver.reboot(
                self.context, self.instance, self.network_info, 'HARD')
            self.assertEqual(nested, self.agent.containers[
                uuids.instance]['spec']['nesting'])

    def test_ephemeral_disk(self):
        """It is a part of the root, which is not made smaller."""
        self.assertIn('smaller', str(self.refused(root_gb=7, ephemeral_gb=2)))
        self.leave(root_gb=7, ephemeral_gb=4)

    def test_the_offer_fails(self):
        self.agent.failures['transfer_offer'] = errors.ContainerError(
            'bad_state', 'no')
        self.assertIsInstance(self.refused(), exception.ResizeError)

    def test_the_new_host_has_a_former_release(self):
        self.peer = {'protocol': 1, 'hostname': 'h2'}
        error = self.refused()
        self.assertIn('Upgrade nova-pycontainer on h2 first', str(error))
        self.assertNotIn('stop', self.agent.calls)

    def test_range_of_ids_that_is_taken_there(self):
        self.others = [self.make_instance(uuid=uuids.other)]
        self.others[0].system_metadata = dict(self.instance.system_metadata)
        self.assertIn('same range', str(self.refused()))
        self.assertNotIn('stop', self.agent.calls)

    def test_the_new_host_is_not_one_of_ours(self):
        def unknown(context, host):
            raise exception.MigrationError(reason='no certificate')

        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration_data.recorded_identity', unknown))
        self.assertIn('no certificate', str(self.refused()))
        self.assertNotIn('stop', self.agent.calls)

    def test_revert_of_one_that_did_not_leave(self):
        self.driver.finish_revert_migration(
            self.context, self.instance, self.network_info, self.record,
            None, True)
        self.assertEqual(power_state.RUNNING, self.state())

    def test_it_is_started_where_nova_says_that_it_is(self):
        self.leave()
        self.driver.reboot(
            self.context, self.instance, self.network_info, 'HARD')
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertIsNone(self.agent.containers[uuids.instance]['offered'])

    def test_confirm(self):
        self.leave()
        self.driver.confirm_migration(
            self.context, self.record, self.instance, self.network_info)
        self.assertEqual({}, self.agent.containers)

    def test_nothing_is_removed_on_one_host(self):
        self.record.dest_compute = 'host1'
        self.leave()
        self.driver.confirm_migration(
            self.context, self.record, self.instance, self.network_info)
        self.assertIn(uuids.instance, self.agent.containers)
        self.instance.task_state = 'resize_reverting'
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.assertIn(uuids.instance, self.agent.containers)
        self.record.source_compute = 'host2'
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.assertEqual({}, self.agent.containers)


class GoOnTestCase(TestCase):
    """Of a server that was on its way when nova-compute ended here."""

    def setUp(self):
        super().setUp()
        self.driver.power_off(self.instance)
        self.agent.transfer_offer(uuids.instance, uuids.migration, {})
        self.record.source_compute = 'host0'
        self.record.dest_compute = 'host1'
        self.agent.calls.clear()
        self.item = self.agent.containers[uuids.instance]
        self.item['offered'] = None

    def go_on(self, *calls):
        self.driver.finish_migration(
            self.context, self.record, self.instance,
            migration_data.dump_disk_info(
                facts=None, here=False, migration=uuids.migration),
            self.network_info, self.make_image_meta(), False, None)
        self.assertEqual(
            [*calls], [c for c in self.agent.calls if 'transfer' in c])
        self.assertEqual(power_state.RUNNING, self.state())
        self.assertEqual(uuids.migration, arrival.came(self.instance))

    def test_nothing_has_come(self):
        del self.agent.containers[uuids.instance]
        self.go_on('transfer_describe', 'transfer_take')

    def test_of_an_earlier_stay(self):
        self.go_on('transfer_describe', 'transfer_take')

    def test_of_an_earlier_migration(self):
        self.item['incoming'] = uuids.other
        self.go_on('transfer_describe', 'transfer_take')

    def test_one_that_waits_for_another_host(self):
        self.item.update(state='defined', offered=uuids.other)
        self.go_on('transfer_describe', 'transfer_take')

    def test_one_that_runs_here(self):
        self.item.update(state='running')
        error = self.assertRaises(exception.MigrationError, self.go_on)
        self.assertIn('running on the destination already', str(error))

    def test_a_part_has_come(self):
        self.item['incoming'] = uuids.migration
        self.go_on('transfer_resume')

    def test_the_agent_copies(self):
        self.item['incoming'] = uuids.migration
        phases = ['copying', 'copying', 'completed']

        def status(migration, wait_s=0.0):
            if phases[1:] == ['completed']:
                self.agent._taken(uuids.instance, migration)
            return {'phase': phases.pop(0)}

        self.agent.migration_status = status
        self.go_on()
        self.assertEqual([], phases)

    def test_all_has_come(self):
        self.item['arrived'] = uuids.migration
        for state in ('defined', 'stopped', 'running'):
            self.item['state'] = state
            self.instance.system_metadata.pop(arrival.CAME, None)
            self.go_on()

    def test_it_came_while_nobody_looked(self):
        self.item['arrived'] = uuids.migration
        self.driver.reboot(
            self.context, self.instance, self.network_info, 'HARD')
        self.assertEqual(uuids.migration, arrival.came(self.instance))

    def test_it_goes_back(self):
        self.instance.system_metadata[arrival.CAME] = uuids.migration
        self.instance.task_state = 'resize_reverting'
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.assertIsNone(arrival.came(self.instance))

    def test_it_is_made_anew(self):
        self.driver.destroy(self.context, self.instance, self.network_info)
        self.spawn()
        self.assertEqual(uuids.migration, arrival.came(self.instance))

    def test_started_where_it_has_not_come(self):
        del self.agent.containers[uuids.instance]
        self.driver.reboot(
            self.context, self.instance, self.network_info, 'HARD')
        self.assertIn('transfer_describe', self.agent.calls)
        self.assertEqual(power_state.RUNNING, self.state())

    def test_started_where_it_is_lost(self):
        del self.agent.containers[uuids.instance]
        for lost in ({'came': uuids.migration}, {'dest': 'host2'},
                     {'source': 'host1'}):
            self.instance.system_metadata[arrival.CAME] = lost.get('came', '')
            self.record.dest_compute = lost.get('dest', 'host1')
            self.record.source_compute = lost.get('source', 'host0')
            error = self.assertRaises(
                exception.InstancePowerOnFailure, self.driver.reboot,
                self.context, self.instance, self.network_info, 'HARD')
            self.assertIn('not on this host', str(error))


class ForgetTestCase(TestCase):
    """What the source does with the files that it has offered."""

    def setUp(self):
        super().setUp()
        self.driver.power_off(self.instance)
        self.agent.transfer_offer(uuids.instance, uuids.migration, {})
        self.instance.host = 'host2'
        self.instance.task_state = None
        records = {uuids.former: 4, uuids.migration: 5, uuids.later: 6}
        for name, found in (
                ('Instance', lambda *a, **k: self.instance),
                ('Migration', lambda context, uuid: objects.Migration(
                    id=records[uuid]))):
            self.useFixture(fixtures.MonkeyPatch(
                f'nova.objects.{name}.get_by_uuid', staticmethod(found)))

    def kept(self, came, state='active'):
        self.instance.vm_state = state
        self.instance.system_metadata = {arrival.CAME: came} if came else {}
        self.driver._resizer.forget(self.context)
        return uuids.instance in self.agent.containers

    def test_it_has_come(self):
        self.assertTrue(self.kept(uuids.migration, 'resized'))
        self.assertTrue(self.kept(uuids.migration, 'error'))
        self.assertFalse(self.kept(uuids.migration))

    def test_it_has_moved_alive(self):
        item = self.agent.containers[uuids.instance]
        item.update(offered=None, moved={'migration': uuids.migration})
        self.instance.task_state = 'migrating'
        self.assertTrue(self.kept(None))
        self.instance.task_state = None
        self.assertFalse(self.kept(None))

    def test_it_has_moved_alive_and_is_shelved(self):
        item = self.agent.containers[uuids.instance]
        item.update(offered=None, moved={'migration': uuids.migration})
        self.instance.host = None
        self.assertFalse(self.kept(None, 'shelved_offloaded'))

    def test_it_comes_back_before_that(self):
        item = self.agent.containers[uuids.instance]
        item.update(offered=None, moved={'migration': uuids.migration},
                    state='stopped')
        self.assertFalse(self.driver.instance_exists(self.instance))
        self.spawn()
        self.assertTrue(self.driver.instance_exists(self.instance))

    def test_it_has_come_and_moved_on(self):
        self.assertFalse(self.kept(uuids.later))

    def test_its_state_was_reset_before_it_has_come(self):
        self.assertTrue(self.kept(None))
        self.assertTrue(self.kept(uuids.former))
