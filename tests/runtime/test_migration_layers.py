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

"""A migration to a host without the image's layer, which Glance has no more.

So it comes from the source, before the guest is touched.
"""

import os
import subprocess

from nova_pycontainer.runtime import errors
from tests.runtime import base
from tests.runtime import hosts
from tests.runtime import sync_base

#: Slow enough for a test to do something meanwhile, for debian13 at least.
SLOW = {'bandwidth': 4 << 20}


class LayerMigrationTestCase(hosts.TwoHostsTestCase):

    def _host(self, name, address):
        made = super()._host(name, address)
        if name == 'b':
            # A store of its own, which is empty.
            (made.directory / 'state' / 'layers').unlink()
        return made

    def store(self):
        return self.b.directory / 'state' / 'layers'

    def debian(self):
        return self.run_container('debian13', memory=512, init={
            'argv': ['/bin/sleep', '100000']})

    def begin(self, uuid, *faults, **options):
        """Begin, and wait until the layer is on its way."""
        migration = self.prepare_migration(uuid, self.a, self.b, **options)
        self.wait_sent(migration)
        return migration

    def wait_sent(self, migration):
        base.wait_for(
            lambda: self.a.migration_status(migration)['layer_sent'] > 1 << 20,
            'a part of the layer')

    def error(self, migration):
        return base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')['error']

    def assert_not_moved(self, uuid):
        """It runs at the source, and nothing is left at the destination."""
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.sh(self.a, uuid, 'true')

        def left():
            return [*self.b.list(), *(
                name for place in (
                    self.store() / '.staging', self.store() / '.locks',
                    self.b.directory / 'state/instances')
                for name in os.listdir(place))]

        # Who fetches ends a little later than the migration.
        base.wait_for(lambda: not left(), 'the clean-up')
        self.assertEqual([], self.b.layer_list())

    def test_from_the_source(self):
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid, 'echo mine > /etc/mine')
        there, here = self.migrate(uuid, self.a, self.b)
        self.assertGreater(there['layer_total'], 0)
        self.assertGreaterEqual(there['layer_sent'], there['layer_total'] / 2)
        self.assertEqual(there['layer_sent'], here['layer_sent'])
        self.assertEqual('mine', self.sh(self.b, uuid, 'cat /etc/mine'))
        # It is the same one, in the store as any other.
        key = self.b.info(uuid)['layer']
        [copy] = self.b.layer_list()
        [layer] = [la for la in self.a.layer_list() if la['key'] == key]
        self.assertEqual(layer, copy)
        self.assertEqual(
            sync_base.tree(self.a.directory / 'state/layers' / key / 'root'),
            sync_base.tree(self.store() / key / 'root'))
        error = self.assertRaises(
            errors.ContainerError, self.b.layer_delete, key)
        self.assertEqual('layer_in_use', error.code)
        # A new start needs all of it.
        self.b.reboot(uuid, 0)
        self.assertEqual('mine', self.sh(self.b, uuid, 'cat /etc/mine'))
        # The next one finds it.
        other = self.run_container()
        there, _here = self.migrate(other, self.a, self.b)
        self.assertEqual(0, there['layer_total'])

    def test_two_at_once(self):
        go = self.top / 'go'
        self.b.restart_agent(f'layer.fetching=wait:{go}')
        uuids = [self.run_container() for _ in range(2)]
        migrations = [self.prepare_migration(uuid, self.a, self.b)
                      for uuid in uuids]
        base.wait_for(lambda: all(
            self.b.migration_status(m)['layer_total'] for m in migrations),
            'both to want it')
        self.assertEqual([], self.b.layer_list())
        go.touch()
        done = [self.finish_migration(uuid, migration, self.a, self.b)
                for uuid, migration in zip(uuids, migrations, strict=True)]
        self.assertEqual([False, True], sorted(
            bool(there['layer_sent']) for there, _here in done))
        self.assertEqual(1, len(self.b.layer_list()))
        for uuid in uuids:
            self.sh(self.b, uuid, 'true')

    def test_abort(self):
        uuid = self.debian()
        migration = self.begin(uuid, **SLOW)
        status = self.a.migration_status(migration)
        self.assertLess(status['layer_sent'], status['layer_total'])
        self.a.migration_abort(migration, 'changed my mind')
        self.assertEqual(
            'aborted', self.a.migration_status(migration)['phase'])
        self.assert_not_moved(uuid)
        # Not a trace of it is in the way of the next.
        self.migrate(uuid, self.a, self.b)
        self.sh(self.b, uuid, 'true')

    def test_roll_back_at_the_destination(self):
        uuid = self.debian()
        migration = self.begin(uuid, **SLOW)
        self.b.migration_abort(migration, 'rolled back')
        self.assertEqual(
            'aborted', self.b.migration_status(migration)['phase'])
        self.error(migration)
        self.assert_not_moved(uuid)

    def test_abort_while_another_brings_it(self):
        uuids = [self.debian() for _ in range(2)]
        first = self.begin(uuids[0], **SLOW)
        second = self.prepare_migration(uuids[1], self.a, self.b)
        base.wait_for(
            lambda: self.b.migration_status(second)['layer_total'],
            'the second to wait')
        self.a.migration_abort(second, 'changed my mind')
        base.wait_for(lambda: [uuids[0]] == [
            info['uuid'] for info in self.b.list()], 'the clean-up')
        self.a.migration_abort(first, 'changed my mind')
        for uuid in uuids:
            self.assert_not_moved(uuid)

    def test_source_dies(self):
        uuid = self.debian()
        self.begin(uuid, **SLOW)
        self.a.kill_agent()
        base.wait_for(lambda: not self.b.list(), 'the clean-up')
        self.a.start_agent()
        self.assert_not_moved(uuid)
        self.migrate(uuid, self.a, self.b)
        self.sh(self.b, uuid, 'true')

    def test_destination_dies(self):
        uuid = self.debian()
        migration = self.begin(uuid, **SLOW)
        self.b.kill_agent()
        self.assertEqual('network', self.error(migration)['code'])
        self.b.start_agent()
        self.assert_not_moved(uuid)

    def small_store(self, mib):
        """A file system of that size for the layers of the destination."""
        self.b.stop_agent()
        disk = self.top / 'disk.img'
        disk.touch()
        os.truncate(disk, mib << 20)
        subprocess.run(['mkfs.ext4', '-q', '-F', str(disk)], check=True,
                       timeout=60)
        self.b.run('mount', '-o', 'loop', str(disk), str(self.store()))
        self.b.start_agent()

    def test_no_space(self):
        self.small_store(700)
        uuid = self.debian()
        migration = self.prepare_migration(uuid, self.a, self.b)
        error = self.error(migration)
        print(error)
        self.assertEqual('no_space', error['code'])
        self.assertIn('the files of the image do not fit on pyc-test',
                      error['message'])
        self.assertIn('MiB are free', error['cause'])
        self.assertEqual(
            0, self.a.migration_status(migration)['layer_sent'])
        self.check_full(uuid)

    def test_disk_fills_meanwhile(self):
        self.small_store(1000)
        go = self.top / 'go'
        self.b.restart_agent(f'layer.fetching=wait:{go}')
        uuid = self.debian()
        migration = self.prepare_migration(uuid, self.a, self.b)
        base.wait_for(lambda: any(
            self.b.run('ls', str(self.store() / '.staging')).stdout),
            'the copy to begin')
        self.b.run('fallocate', '-l', '750M', str(self.store() / '.filler'))
        go.touch()
        error = self.error(migration)
        print(error)
        self.assertEqual('no_space', error['code'])
        self.assertIn('the files of the image do not fit on pyc-test',
                      error['message'])
        self.check_full(uuid)

    def check_full(self, uuid):
        """Seen from within the destination's mounts."""
        self.sh(self.a, uuid, 'true')
        base.wait_for(
            lambda: not self.b.list() and not self.b.run(
                'ls', str(self.store() / '.staging')).stdout, 'the clean-up')
        self.assertEqual([], self.b.layer_list())

    def test_room_is_checked_before(self):
        uuid = self.run_container()
        facts = self.a.migration_check_source(uuid)['facts']
        self.assertGreater(facts['layer_bytes'], 0)
        found = self.b.migration_check_destination(facts)
        self.assertEqual([], found['problems'])
        self.assertFalse(found['facts']['layer_present'])
        problem, = self.b.migration_check_destination(
            {**facts, 'layer_bytes': 1 << 60})['problems']
        self.assertEqual('disk', problem['name'])
        self.assertIn('and its image', problem['reason'])
