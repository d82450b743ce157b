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


"""FUSE: a guest mounts the file system of a volume itself."""

import pathlib
import subprocess
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import fuse
from tests import loop
from tests.runtime import base
from tests.runtime import hosts

MOUNT = 'mkdir -p /mnt/data; fuse2fs -o fakeroot /dev/vdb /mnt/data'
UNMOUNT = ('umount /mnt/data; while pidof fuse2fs >/dev/null; do '
           'sleep 0.05; done')
#: A host without FUSE, as far as a host of the tests can be one.
HIDE = 'mount --bind /dev/null /dev/fuse'


class FuseTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        if not fuse.of_host():
            self.skipTest('this kernel has no FUSE')
        self.device = loop.Loop(
            pathlib.Path(self.top, 'volume'), 64 * base.MIB)
        self.addCleanup(self.device.close)
        subprocess.run(['mkfs.ext4', '-q', self.device.path], check=True,
                       timeout=60)
        self.volume = {'id': str(uuidlib.uuid4()), 'name': 'vdb',
                       'path': self.device.path}
        self.record = self.top / 'points'

    def run_debian(self, **more):
        # Nothing of the guest's but what a test starts.
        return self.run_container('sysvinit', init={
            'argv': ['/bin/sleep', 'infinity']}, **more)

    def mounted(self):
        uuid = self.run_debian()
        self.a.volume_attach(uuid, self.volume)
        self.sh(self.a, uuid, MOUNT)
        self.assertEqual('fuse.ext4', self.sh(
            self.a, uuid, 'findmnt -n -o FSTYPE /mnt/data'))
        return uuid

    def problems(self, uuid):
        facts = self.a.migration_check_source(uuid)
        return facts['problems'] + self.b.migration_check_destination(
            facts['facts'])['problems']

    def content(self, name):
        return subprocess.run(
            ['debugfs', '-R', f'cat {name}', self.device.path], check=True,
            capture_output=True, text=True, timeout=30).stdout

    def record_points(self):
        self.a.record = self.record
        self.a.restart_agent()

    def points(self):
        return self.record.read_text() if self.record.exists() else ''

    def test_a_volume_is_mounted(self):
        uuid = self.mounted()
        self.sh(self.a, uuid, 'echo from the guest > /mnt/data/file; sync')
        # Other users of it, too, can be given one.
        self.assertEqual('crw-rw-rw- 0 0', self.sh(
            self.a, uuid, 'stat -c "%A %u %g" /dev/fuse'))
        # What has the device open is named, and it stays.
        error = self.assertRaises(
            errors.ContainerError, self.a.volume_detach, uuid,
            self.volume['id'])
        self.assertEqual('in_use', error.code)
        self.assertIn('fuse2fs', str(error))
        self.sh(self.a, uuid, UNMOUNT)
        self.assertEqual('from the guest\n', self.content('file'))
        self.a.volume_detach(uuid, self.volume['id'])

    def test_nobody_of_the_host_waits_for_it(self):
        """Its root gets no answer of the guest's, and so never waits for
        one.
        """
        uuid = self.mounted()
        pid = self.a.info(uuid)['pid']
        self.sh(self.a, uuid, 'kill -STOP $(pidof fuse2fs)')
        done = subprocess.run(
            ['ls', f'/proc/{pid}/root/mnt/data/lost+found'],
            capture_output=True, text=True, timeout=10)
        self.assertIn('Permission denied', done.stderr)
        self.assertEqual({'mount', 'device'}, {
            p['name'] for p in self.problems(uuid)})
        self.sh(self.a, uuid, 'kill -CONT $(pidof fuse2fs)')
        self.sh(self.a, uuid, UNMOUNT)

    def test_refused_before_it_is_frozen(self):
        uuid = self.mounted()
        self.sh(self.a, uuid, 'echo kept > /mnt/data/file')
        self.record_points()
        problems = self.problems(uuid)
        print(problems)
        self.assertEqual({'mount', 'device'}, {p['name'] for p in problems})
        self.assertIn('/mnt/data is a fuse.ext4 file system, which CRIU '
                      'cannot dump', str(problems))
        error = self.assertRaises(
            errors.ContainerError, self.a.suspend, uuid)
        print(error)
        self.assertEqual('unsupported', error.code)
        self.assertIn('/mnt/data is a fuse.ext4', error.message)
        self.assertIn('Unmount it', error.remedy)
        # It came after the check.
        migration = self.prepare_migration(uuid, self.a, self.b)
        error = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')['error']
        self.b.migration_abort(migration, 'Nova rolls back')
        self.assertEqual('unsupported', error['code'])
        self.assertIn('/mnt/data is a fuse.ext4', error['message'])
        self.assertNotIn('frozen', self.points())
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.assertEqual('kept', self.sh(
            self.a, uuid, 'cat /mnt/data/file'))
        base.wait_for(lambda: self.b.list() == [], 'the clean-up')
        # And not any more.
        self.sh(self.a, uuid, UNMOUNT)
        self.assertEqual([], self.problems(uuid))
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.migrate(uuid, self.a, self.b)
        self.assertIn('source.frozen', self.points())
        self.sh(self.b, uuid, MOUNT)
        self.assertEqual('kept', self.sh(
            self.b, uuid, 'cat /mnt/data/file'))
        self.sh(self.b, uuid, UNMOUNT)

    def test_only_open(self):
        """A mount that has gone from the tree, and its program has not."""
        uuid = self.mounted()
        self.sh(self.a, uuid, 'setsid sh -c "cd /mnt/data; touch /run/in; '
                'exec sleep 1000" </dev/null >/dev/null 2>&1 & '
                'while [ ! -e /run/in ]; do sleep 0.05; done; '
                'umount -l /mnt/data')
        self.record_points()
        problem, *_ = self.problems(uuid)
        self.assertEqual('device', problem['name'])
        error = self.assertRaises(
            errors.ContainerError, self.a.suspend, uuid)
        print(error)
        self.assertEqual('unsupported', error.code)
        self.assertNotIn('frozen', self.points())

    def load(self, uuid, script):
        self.sh(self.a, uuid, f'setsid sh -c "while :; do {script}; done" '
                '</dev/null >/dev/null 2>&1 &')

    def test_paused(self):
        """Also in the middle of what its file system has been asked for."""
        uuid = self.mounted()
        self.load(uuid, 'dd if=/dev/zero of=/mnt/data/load bs=1M count=8; '
                  'sleep 0.01')
        for _ in range(10):
            self.a.pause(uuid)
            self.assertEqual('paused', self.a.info(uuid)['state'])
            self.a.unpause(uuid)

    def test_never_idle(self):
        """One that is never not being asked cannot be frozen, and goes on."""
        uuid = self.mounted()
        self.sh(self.a, uuid, 'kill -STOP $(pidof fuse2fs)')
        self.load(uuid, 'ls /mnt/data/lost+found; sleep 1')
        base.wait_for(lambda: self.sh(self.a, uuid, 'pidof ls || :'),
                      'a process that waits')
        error = self.assertRaises(errors.ContainerError, self.a.pause, uuid)
        self.assertEqual('timeout', error.code)
        self.assertEqual('running', self.a.info(uuid)['state'])
        self.sh(self.a, uuid, 'kill -CONT $(pidof fuse2fs)')
        self.a.pause(uuid)
        self.a.unpause(uuid)
        self.sh(self.a, uuid, 'kill -STOP $(pidof fuse2fs)')
        self.a.kill(uuid)
        self.assertEqual('stopped', self.a.info(uuid)['state'])

    def test_hosts_without(self):
        uuid = self.run_debian()
        self.b.run('sh', '-c', HIDE)
        problem, = self.problems(uuid)
        print(problem)
        self.assertEqual('fuse', problem['name'])
        self.assertIn('modprobe', problem['remedy'])
        # Who did not ask: nothing of it is lost.
        migration = self.prepare_migration(uuid, self.a, self.b)
        error = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')['error']
        print(error)
        self.assertIn('/dev/fuse, which this host has not', str(error))
        self.b.migration_abort(migration, 'Nova rolls back')
        self.sh(self.a, uuid, 'true')
        base.wait_for(lambda: self.b.list() == [], 'the clean-up')
        # One that starts there has none, and goes anywhere.
        plain = self.run_debian(host=self.b)
        self.sh(self.b, plain, 'test ! -e /dev/fuse')
        self.migrate(plain, self.b, self.a)
        self.sh(self.a, plain, 'test ! -e /dev/fuse')
        self.migrate(plain, self.a, self.b)

    def test_suspended_and_resumed_without(self):
        uuid = self.run_debian()
        self.a.suspend(uuid)
        self.a.run('sh', '-c', HIDE)
        error = self.assertRaises(errors.ContainerError, self.a.resume, uuid)
        print(error)
        self.assertEqual('unsupported', error.code)
        self.assertEqual('suspended', self.a.info(uuid)['state'])
        self.a.run('umount', '/dev/fuse')
        self.a.resume(uuid)
        self.sh(self.a, uuid, 'test -c /dev/fuse')
