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

"""Live migration: what does not need Nova's services around it."""

import threading
from unittest import mock

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects
from nova.objects import base as object_base
from oslo_serialization import jsonutils
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import migration
from nova_pycontainer import migration_data
from nova_pycontainer import migration_destination
from nova_pycontainer import migration_recovery
from nova_pycontainer.runtime import errors
from tests.unit.driver import base
from tests.unit.driver import driver_base


def record(**values):
    return {'hypervisor_hostname': 'host1', 'hypervisor_version': 1,
            'cpu_info': jsonutils.dumps({'migration': {
                'certificate': 'PEM', 'fingerprint': 'aa:bb'}}), **values}


class MigrationDataTest(base.TestCase):

    def travel(self, data):
        """Send it over RPC, as conductor sees it too."""
        serializer = object_base.NovaObjectSerializer()
        return serializer.deserialize_entity(
            self.context, jsonutils.loads(jsonutils.dumps(
                serializer.serialize_entity(self.context, data))))

    def test_travels(self):
        data = migration_data.create(
            [base.make_vif(1)], False, 100, layer='sha512-1')
        data = self.travel(data)
        self.assertIsInstance(data, objects.LibvirtLiveMigrateData)
        self.assertEqual({'protocol': 1, 'layer': 'sha512-1'},
                         migration_data.get(data))
        self.assertTrue(data.vifs[0].supports_os_vif_delegation)
        migration_data.put(data, migration=uuids.migration)
        self.assertEqual({'protocol': 1, 'migration': uuids.migration},
                         migration_data.get(self.travel(data)))

    def test_manager_cleans_up(self):
        # What ComputeManager._live_migration_cleanup_flags looks at.
        data = migration_data.create([], None, None)
        self.assertFalse(data.is_shared_instance_path)
        self.assertFalse(data.is_shared_block_storage)
        self.assertTrue(data.block_migration)
        self.assertFalse(data.has_vtpm)
        self.assertNotIn('target_mdevs', data)
        self.assertNotIn('dst_numa_info', data)
        self.assertNotIn('disk_over_commit', data)
        self.assertNotIn('src_supports_numa_live_migration', data)

    def test_other_protocol(self):
        data = migration_data.create([], None, None)
        text = migration_data.dump_disk_info(spec={})
        with fixtures.MonkeyPatch(
                'nova_pycontainer.host.HYPERVISOR_VERSION', 2):
            for call in (lambda: migration_data.get(data),
                         lambda: migration_data.load_disk_info(text)):
                error = self.assertRaises(exception.MigrationError, call)
                self.assertIn('version 1', str(error))
                self.assertIn('speaks version 2', str(error))
                self.assertIn('on the other host', str(error))

    def test_not_ours(self):
        data = objects.LibvirtLiveMigrateData()
        self.assertRaises(exception.MigrationError, migration_data.get, data)
        for text in (None, '', '{}', '[]', '1', 'x'):
            self.assertRaises(exception.MigrationError,
                              migration_data.load_disk_info, text)

    def test_identity(self):
        self.assertEqual('PEM', migration_data.identity(
            record()['cpu_info'], 'host1')['certificate'])
        for text in (None, '', '{}', '[]', '{"migration": null}',
                     '{"migration": {"certificate": ""}}'):
            error = self.assertRaises(
                exception.MigrationError, migration_data.identity, text,
                'host1')
            self.assertIn('host1', str(error))

    def test_vifs_of_a_migration_that_failed_early(self):
        vif = base.make_vif(1)
        data = migration_data.create([vif], None, None)
        self.assertEqual(
            [vif['id']],
            [v['id'] for v in migration_data.destination_vifs(data, [])])
        data = migration_data.create(None, None, None)
        self.assertEqual(
            [vif], migration_data.destination_vifs(data, [vif]))

    def test_vifs_of_the_destination(self):
        data = migration_data.create([base.make_vif(1)], None, None)
        # Conductor does this.
        data.vifs[0].vif_type = 'tap'
        data.vifs[0].vnic_type = 'normal'
        data.vifs[0].vif_details = {'connectivity': 'l2'}
        vif, = migration_data.destination_vifs(data, [])
        self.assertEqual('tap', vif['type'])
        self.assertEqual({'connectivity': 'l2'}, vif['details'])
        self.assertTrue(vif['delegate_create'])


class DestinationTest(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.spawn()
        self.info = self.agent.info(self.instance.uuid)
        self.agent.delete(self.instance.uuid)
        self.agent.links.clear()
        self.plugged.clear()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration_data.recorded_identity',
            lambda context, host: {'certificate': 'PEM', 'of': host}))

    def prepare(self, vifs=None, uuid=uuids.migration, **spec):
        data = migration_data.create(None, None, None)
        migration_data.put(data, migration=uuid)
        return self.driver.pre_live_migration(
            self.context, self.instance, {},
            self.network_info if vifs is None else vifs,
            migration_data.dump_disk_info(
                spec={**self.info['spec'], **spec},
                base_id=self.info['base_id']), data)

    def test_prepare(self):
        data = self.prepare()
        identity = self.agent.identity()
        self.assertEqual(
            f'{identity["address"]}:{identity["port"]}',
            data.target_connect_addr)
        self.assertEqual(
            {'protocol': 1, 'migration': uuids.migration, 'endpoint': {
                key: identity[key]
                for key in ('address', 'port', 'fingerprint', 'protocol',
                            'state_format')}},
            migration_data.get(data))
        (name, source, _options), = self.agent.prepared
        self.assertEqual(uuids.migration, name)
        self.assertEqual(
            {'certificate': 'PEM', 'of': self.instance.host}, source)
        there = self.agent.info(self.instance.uuid)
        self.assertEqual(self.info['base_id'], there['base_id'])
        self.assertEqual(2, len(self.plugged))

    def test_nics_keep_their_order(self):
        # Nova's list has another order than when the guest was started.
        self.prepare([*reversed(self.network_info)])
        self.assertEqual(
            [nic['id'] for nic in self.info['nics']],
            [nic['id'] for nic in self.agent.info(
                self.instance.uuid)['nics']])

    def test_other_ports(self):
        error = self.assertRaises(
            exception.MigrationError, self.prepare, self.network_info[:1])
        self.assertIn('hard reboot', str(error))
        self.assert_clean()

    def assert_clean(self):
        self.assertEqual({}, self.agent.containers)
        self.assertEqual({}, self.agent.links)
        self.assertEqual({}, self.plugged)

    def test_prepare_fails(self):
        for verb in ('plug', 'migration_prepare'):
            self.agent.failures[verb] = errors.ContainerError(
                'oci_failed', 'it does not work', uuid=self.instance.uuid)
            error = self.assertRaises(exception.MigrationError, self.prepare)
            self.assertIn('it does not work', str(error))
            self.assert_clean()
            del self.agent.failures[verb]

    def test_alive_already(self):
        self.agent.containers[self.instance.uuid] = {
            **self.info, 'state': 'running'}
        error = self.assertRaises(exception.MigrationError, self.prepare)
        self.assertIn('is running on the destination already', str(error))
        self.assertIn(self.instance.uuid, self.agent.containers)

    def test_other_data_of_the_image(self):
        """The layer will come from the source."""
        self.agent.layers.clear()
        self.prepare(layer='sha512-other')
        self.assertEqual({}, self.agent.layers)

    def test_image_that_cannot_be_had(self):
        self.agent.layers.clear()
        image_id = self.instance.image_ref
        images = self.driver._images
        for error in (
                exception.ImageNotFound(image_id=image_id),
                exception.ImageNotAuthorized(image_id=image_id),
                exception.CouldNotFetchImage(image_id=image_id),
                exception.GlanceConnectionFailed(
                    server='glance', reason='it is down')):
            for method in ('key', 'ensure'):
                with mock.patch.object(images, method, autospec=True,
                                       side_effect=error):
                    self.prepare()
        self.assertEqual({}, self.agent.layers)

    def test_arrived(self):
        self.prepare()
        error = self.assertRaises(
            exception.MigrationError,
            self.driver.post_live_migration_at_destination, self.context,
            self.instance, self.network_info)
        self.assertIn('defined', str(error))
        self.agent.containers[self.instance.uuid]['state'] = 'paused'
        del self.instance.system_metadata['pycontainer_base_id']
        self.driver.post_live_migration_at_destination(
            self.context, self.instance, self.network_info)
        self.assertEqual(
            str(self.info['base_id']),
            self.instance.system_metadata['pycontainer_base_id'])
        self.assertEqual(power_state.PAUSED, self.state())

    def test_arrived_and_ended(self):
        """The host has lost its power since, or its guest has shut down."""
        self.prepare()
        item = self.agent.containers[self.instance.uuid]
        for resume, ended, found in (
                (True, {'code': 0, 'signal': None}, power_state.SHUTDOWN),
                (False, {'code': None, 'signal': None}, power_state.SHUTDOWN),
                (True, {'code': None, 'signal': None}, power_state.RUNNING)):
            self.flags(resume_guests_state_on_host_boot=resume)
            item.update(state='stopped', exit=ended)
            self.driver.post_live_migration_at_destination(
                self.context, self.instance, self.network_info)
            self.assertEqual(found, self.state())

    def rollback(self, data):
        self.driver.rollback_live_migration_at_destination(
            self.context, self.instance, self.network_info, {},
            migrate_data=data)

    def test_rollback(self):
        data = self.prepare()
        self.rollback(data)
        self.assert_clean()
        self.assertEqual('aborted', self.agent.migration_status(
            uuids.migration)['phase'])
        # Again, and after the agent has forgotten it.
        self.rollback(data)
        self.agent.forget_migrations()
        self.rollback(data)

    def test_rollback_while_the_agent_is_away(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.patience._RETRY_S', 0.05))
        data = self.prepare()
        self.agent.down = True
        back = threading.Timer(0.3, setattr, (self.agent, 'down', False))
        back.start()
        self.addCleanup(back.cancel)
        self.rollback(data)
        self.assert_clean()

    def test_rollback_of_nothing(self):
        self.rollback(objects.LibvirtLiveMigrateData())
        self.assert_clean()

    def test_no_rollback_of_what_runs(self):
        data = self.prepare()
        for phase in ('committed', 'running', 'completed'):
            self.agent._progress[uuids.migration]['phase'] = phase
            self.assertRaises(exception.MigrationError, self.rollback, data)
        self.agent.forget_migrations()
        self.agent.containers[self.instance.uuid]['state'] = 'running'
        self.assertRaises(exception.MigrationError, self.rollback, data)
        self.assertIn(self.instance.uuid, self.agent.containers)

    def test_no_rollback_of_a_later_one(self):
        """What the later one has brought, or is about to bring, stays."""
        data = self.prepare()
        self.agent.migration_abort(uuids.migration, 'it was rolled back')
        self.prepare(uuid=uuids.other)
        item = self.agent.containers[self.instance.uuid]
        item['migration'] = uuids.other
        self.agent.calls.clear()
        self.rollback(data)
        self.assertNotIn('unplug', self.agent.calls)
        self.assertNotIn('delete', self.agent.calls)
        item.update(state='running', migration=None)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration_destination._DYING_S', 1))
        self.assertRaises(exception.MigrationError, self.rollback, data)
        self.assertIn(self.instance.uuid, self.agent.containers)

    def test_rolled_back_while_it_is_prepared(self):
        prepare = self.agent.migration_prepare

        def late(*args):
            # The source's service was restarted, and has given up.
            self.driver._migration_destination._over.add(uuids.migration)
            return prepare(*args)

        self.agent.migration_prepare = late
        error = self.assertRaises(exception.MigrationError, self.prepare)
        self.assertIn('rolled back meanwhile', str(error))
        self.assert_clean()

    def test_options(self):
        self.flags(live_migration_bandwidth=0, group='pycontainer')
        self.assertEqual(
            {'permit_post_copy': False, 'max_downtime': 0.5,
             'bandwidth': None},
            migration_destination.options(base.test.CONF.pycontainer))


class SourceTest(driver_base.Base):

    def setUp(self):
        super().setUp()
        self.spawn()
        self.source = self.driver._migration_source
        self.record = mock.Mock(
            spec=objects.Migration, uuid=uuids.migration, id=7,
            status='running')
        self.job = migration.Job(self.instance, self.record)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration._RETRY_S', 0.01))
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.migration._POLL_S', 0.01))

    def says(self, *statuses):
        """Let the agent say these one after another."""
        said = iter(statuses)

        def status(migration, wait_s):
            one = next(said)
            if isinstance(one, Exception):
                raise one
            return {'strategy': 'stop-and-copy', 'error': None, **one}

        self.agent.migration_status = status

    def test_lost_agent_is_waited_for(self):
        lost = errors.AgentUnavailable('agent_unavailable', 'it is gone')
        self.says({'phase': 'copying'}, lost, lost, {'phase': 'completed'})
        self.assertIsNone(self.source.watch(self.job))

    def test_forgotten_and_still_here(self):
        self.says(errors.ContainerError('not_found', 'which migration?'))
        error = self.source.watch(self.job)
        self.assertIsInstance(error, exception.MigrationError)
        self.assertIn('ended with the agent', str(error))

    def test_forgotten_and_moved(self):
        self.says(errors.ContainerError('not_found', 'which migration?'))
        self.agent.containers[self.instance.uuid]['moved'] = {'at': 1.0}
        self.assertIsNone(self.source.watch(self.job))

    def test_forgotten_and_deleted(self):
        self.agent.delete(self.instance.uuid)
        for gone in (exception.InstanceNotFound(instance_id='it'), None):
            self.says(errors.ContainerError('not_found', 'which migration?'))
            self.instance.task_state = task_states.DELETING
            with mock.patch.object(
                    type(self.instance), 'refresh', autospec=True,
                    side_effect=gone):
                self.assertIsInstance(
                    self.source.watch(self.job), exception.MigrationError)

    def test_forgotten_and_cleaned_up(self):
        """It has moved, and its source has removed what it had left."""
        self.says(errors.ContainerError('not_found', 'which migration?'))
        self.agent.delete(self.instance.uuid)
        self.instance.task_state = task_states.MIGRATING
        with mock.patch.object(
                type(self.instance), 'refresh', autospec=True):
            self.assertIsNone(self.source.watch(self.job))

    def test_progress_has_no_zeros(self):
        self.says({'phase': 'completed', 'memory_sent': 0, 'disk_sent': 0,
                   'memory_total': 0})
        self.agent.containers[self.instance.uuid]['memory_bytes'] = 0
        self.source.watch(self.job)
        for name in ('memory_total', 'memory_processed', 'memory_remaining',
                     'disk_processed'):
            self.assertIsNone(getattr(self.record, name), name)

    def test_post_copy_is_said(self):
        self.says({'phase': 'running', 'strategy': 'post-copy'},
                  {'phase': 'completed', 'strategy': 'post-copy'})
        self.assertIsNone(self.source.watch(self.job))
        self.assertEqual('running (post-copy)', self.record.status)

    def test_cancelled_only_if_asked_for(self):
        aborted = {'phase': 'aborted', 'error': {
            'code': 'aborted', 'message': 'the migration was aborted',
            'cause': 'the other host says so'}}
        self.says(aborted)
        error = self.source.watch(self.job)
        self.assertNotIsInstance(error, migration.Cancelled)
        self.says(aborted)
        self.job.aborted = 'it was aborted by the operator'
        self.assertIsInstance(
            self.source.watch(self.job), migration.Cancelled)

    def test_time_limit(self):
        self.flags(live_migration_completion_timeout=100,
                   group='pycontainer')
        # 512 MiB count as 2 GiB, and the disk has 10.
        self.assertEqual(1200, self.source._time_limit(self.instance))
        self.flags(live_migration_completion_timeout=0, group='pycontainer')
        self.assertEqual(0, self.source._time_limit(self.instance))

    def test_reason_fits(self):
        error = errors.ContainerError(
            'criu_failed', 'the instance cannot be restored',
            uuid=self.instance.uuid, cause='No such device: ' + 'x' * 300,
            remedy='Run "pycontainer preflight" on both hosts')
        text = str(migration._failed(error))
        self.assertLessEqual(len(text), 255)
        self.assertIn('cannot be restored: No such device', text)
        self.assertNotIn(self.instance.uuid, text)
        error.cause = 'No such device'
        self.assertIn('preflight', str(migration._failed(error)))

    def test_disk_info(self):
        facts = migration_data.load_disk_info(
            self.driver.get_instance_disk_info(self.instance))
        info = self.agent.info(self.instance.uuid)
        self.assertEqual(info['spec'], facts['spec'])
        self.assertEqual(info['base_id'], facts['base_id'])
        self.assertNotIn('config_drive', facts['spec'])

    def test_disk_info_without_agent(self):
        self.agent.down = True
        self.assertRaises(
            exception.HypervisorUnavailable,
            self.driver.get_instance_disk_info, self.instance)


class RecoveryTest(driver_base.Base):

    def live(self, status, kind='live-migration', source=None):
        return status, kind, source or self.instance.host

    def keep_back(self, task_state, *found):
        """Which instances the manager gets.

        :param found: the records of migrations, the newest one last
        """
        self.instance.task_state = task_state

        def get(context, filters):
            if 'status' in filters:
                # Those of other servers.
                return []
            return [record for record in (
                objects.Migration(
                    id=number, uuid=uuids.migration, status=status,
                    migration_type=kind, source_compute=source,
                    instance_uuid=self.instance.uuid)
                for number, (status, kind, source) in enumerate(found))
                if record.migration_type == filters['migration_type']]

        with mock.patch.object(objects.MigrationList, 'get_by_filters', get):
            kept = self.driver.process_instances_at_startup(
                self.context, objects.InstanceList(
                    self.context, objects=[self.instance]))
        return [instance.uuid for instance in kept]

    def test_not_migrating(self):
        self.assertEqual([self.instance.uuid], self.keep_back(
            None, self.live('running')))

    def test_migrating(self):
        for status in ('queued', 'preparing', 'running',
                       'running (post-copy)'):
            self.assertEqual([], self.keep_back(
                task_states.MIGRATING, self.live(status)))

    def test_not_begun(self):
        # The request will come; or the record is of something else.
        for found in ([], [self.live('accepted')],
                      [self.live('running', 'evacuation')]):
            self.assertEqual([self.instance.uuid], self.keep_back(
                task_states.MIGRATING, *found))

    def test_of_an_earlier_one(self):
        """Its end was not written down."""
        early = self.live('running')
        for last in (self.live('accepted'), self.live('completed'),
                     self.live('running', source='another')):
            self.assertEqual([self.instance.uuid], self.keep_back(
                task_states.MIGRATING, early, last))
        self.assertEqual([], self.keep_back(
            task_states.MIGRATING, self.live('running', source='another'),
            early))

    def test_followed_once(self):
        self.keep_back(task_states.MIGRATING, self.live('running'))
        recovery = self.driver._migration_recovery
        followed = []
        recovery._follow = lambda *args: followed.append(args)
        recovery.start()
        recovery.start()
        self.assertEqual(1, len(followed))
        self.assertIsInstance(recovery, migration_recovery.Recovery)

    def test_no_events_until_the_manager_has_it(self):
        """It would have it powered off, which it is about to start."""
        emitted = []
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.driver.PyContainerDriver.emit_event',
            lambda driver, event: emitted.append(event)))
        event = mock.Mock(uuid=self.instance.uuid)
        self.keep_back(task_states.MIGRATING, self.live('running'))
        self.driver._emit(event)
        recovery = self.driver._migration_recovery
        gone_on, seen = threading.Event(), threading.Event()

        def follow(instance, begun):
            self.driver._emit(event)
            seen.set()
            gone_on.wait(30)

        recovery._follow = follow
        recovery.start()
        self.assertTrue(seen.wait(30))
        self.assertEqual([], emitted)
        gone_on.set()
        for thread in threading.enumerate():
            if thread.name.startswith('migration-'):
                thread.join(30)
        self.driver._emit(event)
        self.assertEqual([event], emitted)
