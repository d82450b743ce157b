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

"""A destination without room for the guest.

The server goes on at the source, and the error says what did not fit, and
where.
"""

import subprocess
import time
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from tests.runtime import base
from tests.runtime import hosts


class RoomTestCase(hosts.TwoHostsTestCase):

    def begin(self, uuid, **resources):
        """Migrate to a destination where the guest is to have less."""
        migration = str(uuidlib.uuid4())
        info = self.a.info(uuid)
        spec = {**info['spec'], 'base_id': info['base_id']}
        spec['resources'] = {**spec['resources'], **resources}
        endpoint = self.b.migration_prepare(
            uuid, migration, spec, self.a.host_info()['migration'])
        self.attach(self.b, uuid)
        self.a.migration_begin(uuid, migration, endpoint)
        return migration

    def small_instances(self, mib):
        """A file system of that size for the disks of the destination."""
        disk = self.top / 'disk.img'
        base.make_file_system(disk, mib)
        self.b.run('mount', '-o', 'loop', str(disk), str(
            self.b.directory / 'state/instances'))

    def counting(self, *args, **kwargs):
        uuid = self.run_container(*args, **kwargs)
        self.sh(self.a, uuid, 'setsid sh -c "i=0; while :; do '
                'i=\\$((i+1)); echo \\$i > /count; sleep 0.05; done" '
                '</dev/null >/dev/null 2>&1 &')
        return uuid

    def assert_full(self, uuid, migration, what):
        """The error, and that it is as if nothing had happened."""
        error = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')['error']
        print(error)
        self.assertEqual('no_space', error['code'], error)
        self.assertIn(f'{what} do not fit on pyc-test', error['message'])
        self.assertTrue(error['cause'])
        self.assertTrue(error['remedy'])
        self.assertEqual('running', self.a.info(uuid)['state'])
        before = self.sh(self.a, uuid, 'cat /count')
        base.wait_for(lambda: self.sh(self.a, uuid, 'cat /count') != before,
                      'the guest to do something')
        base.wait_for(lambda: not self._left(uuid), 'the clean-up')
        return error

    def _left(self, uuid):
        """What there is of it at the destination."""
        directories = self.b.run(
            'ls', str(self.b.directory / 'state/instances')).stdout
        mounts = self.b.run('cat', '/proc/mounts').stdout
        return [*self.b.list(), *(
            name for name in directories.split() if name != 'lost+found'), *(
            line for line in mounts.splitlines()
            if 'pycontainer-images' in line or uuid in line)]

    def test_disk_of_the_flavor(self):
        uuid = self.counting()
        self.sh(self.a, uuid, 'dd if=/dev/urandom of=/big bs=1M count=100')
        migration = self.begin(uuid, disk_bytes=64 * base.MIB)
        error = self.assert_full(uuid, migration, 'the files of the guest')
        self.assertIn('No space left on device', error['cause'])
        self.migrate(uuid, self.a, self.b)
        self.sh(self.b, uuid, 'true')

    def test_disk_of_the_host(self):
        """A disk that is a sparse file has room, and its file has not."""
        self.small_instances(128)
        self.b.restart_agent(disk_limit='sparse')
        uuid = self.counting()
        self.sh(self.a, uuid, 'dd if=/dev/urandom of=/big bs=1M count=200')
        migration = self.begin(uuid)
        error = self.assert_full(uuid, migration, 'the files of the guest')
        self.assertIn('MiB are free', error['cause'])
        self.b.run('umount', str(self.b.directory / 'state/instances'))
        self.migrate(uuid, self.a, self.b)
        self.sh(self.b, uuid, 'true')

    def test_disk_that_is_reserved(self):
        """Before anything of the guest is sent."""
        self.small_instances(128)
        self.b.restart_agent(disk_limit='loop')
        uuid = self.counting()
        error = self.assertRaises(
            errors.ContainerError, self.begin, uuid)
        self.assertEqual('no_space', error.code)
        self.assertIn('do not fit on pyc-test', str(error))
        self.assertEqual([], self._left(uuid))
        self.assertEqual('running', self.a.info(uuid)['state'])

    def test_disk_of_the_host_is_full_at_the_end(self):
        """What came last is checked before the right to run is given."""
        self.small_instances(192)
        self.b.restart_agent(disk_limit='sparse')
        go = self.top / 'go'
        self.a.restart_agent(f'source.pass=wait:{go}')
        uuid = self.counting()
        migration = self.begin(uuid)
        base.wait_for(lambda: self.b.migration_status(migration)['passes'],
                      'the first pass')
        # The last pass begins when there is no room any more.
        self.sh(self.a, uuid, 'dd if=/dev/urandom of=/big bs=1M count=60')
        self.b.run('dd', 'if=/dev/zero', 'bs=1M', 'of=' + str(
            self.b.directory / 'state/instances/.filler'), check=False,
            stderr=subprocess.DEVNULL)
        self.a.migration_force_complete(migration)
        go.touch()
        base.wait_for(lambda: self._ended(self.a, migration), 'the end')
        self.b.run('rm', str(
            self.b.directory / 'state/instances/.filler'))
        self.assert_full(uuid, migration, 'the files of the guest')

    def test_memory(self):
        uuid = self.counting('debian13', memory=1024)
        self.sh(self.a, uuid, 'setsid python3 -c "import os, time\n'
                'x = os.urandom(400 << 20)\n'
                'open(\'/full\', \'w\').close()\n'
                'time.sleep(100000)" </dev/null >/dev/null 2>&1 &')
        base.wait_for(lambda: self.sh(self.a, uuid, 'ls /full || :'),
                      'the memory to be used')
        # The images may take a quarter and 256 MiB more.
        began = time.monotonic()
        migration = self.begin(uuid, memory_bytes=32 * base.MIB)
        error = self.assert_full(
            uuid, migration, "the pages of the guest's memory")
        print(f'{time.monotonic() - began:.1f} s')
        self.assertIn('No space left on device', error['cause'])
        self.migrate(uuid, self.a, self.b)
        self.sh(self.b, uuid, 'true')
