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

"""Volumes: real block devices (loop) in real containers."""

import pathlib
import re
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import revert
from tests import loop
from tests.runtime import base
from tests.runtime import hosts

#: Has a device open for as long as it lives, and is a sleep in the end.
HOLD = ('setsid sh -c "exec 3</dev/vdb; echo \\$\\$ > /run/holder; '
        'exec sleep 1000" </dev/null >/dev/null 2>&1 & '
        'while [ ! -s /run/holder ]; do sleep 0.05; done; '
        'until grep -q ^sleep /proc/$(cat /run/holder)/cmdline; do '
        'sleep 0.05; done')
#: Ends it, and not only tells it to end.
LET_GO = ('pid=$(cat /run/holder); kill $pid; '
          'while [ -e /proc/$pid ]; do sleep 0.05; done')


class TestCase(hosts.TwoHostsTestCase):

    def device(self):
        made = loop.Loop(pathlib.Path(self.top, str(uuidlib.uuid4())))
        self.addCleanup(made.close)
        return made

    def volume(self, device, name='vdb', **values):
        return {'id': str(uuidlib.uuid4()), 'name': name,
                'path': device.path, **values}

    def write(self, uuid, text, name='vdb', host=None):
        self.sh(host or self.a, uuid, f'printf %s "{text}" | '
                f'dd of=/dev/{name} conv=notrunc,fsync')

    def refused(self, code, call, *args):
        error = self.assertRaises(errors.ContainerError, call, *args)
        self.assertEqual(code, error.code, error)
        return error

    def names(self, uuid, host=None):
        return self.sh(host or self.a, uuid,
                       'cd /dev; for n in *; do if [ -b $n ]; then '
                       'echo $n; fi; done').split()

    def speeds(self, uuid, host):
        """Read requests per second, of each of its disks."""
        files = [f'/sys/fs/cgroup/{host.cgroup_parent}/{uuid}/io.max',
                 f'/run/cgroup1/blkio/{host.cgroup_parent}/{uuid}/'
                 'blkio.throttle.read_iops_device']
        text = host.run('sh', '-c', f'cat {" ".join(files)} 2>/dev/null || :')
        return [int(found) for found in re.findall(
            r'(?:riops=|:\d+ )(\d+)', text.stdout)]


class VolumesTestCase(TestCase):

    def test_to_and_fro(self):
        uuid = self.run_container()
        device = self.device()
        volume = self.volume(device)
        self.a.volume_attach(uuid, volume)
        self.write(uuid, 'first')
        self.assertEqual(b'first', device.read(5))
        # Twice is once.
        self.a.volume_attach(uuid, volume)
        [told] = self.a.info(uuid)['volumes']
        self.assertEqual(volume['id'], told['id'])
        self.assertEqual(16 << 20, told['statistics']['size_bytes'])
        self.assertGreater(told['statistics']['write_bytes'], 0)
        # It grows by itself.
        device.grow(24 << 20)
        self.assertEqual(str(24 << 20), self.sh(
            self.a, uuid, 'blockdev --getsize64 /dev/vdb'))
        self.a.volume_detach(uuid, volume['id'])
        self.assertEqual([], self.names(uuid))
        self.assertEqual([], self.a.info(uuid)['volumes'])
        self.a.volume_detach(uuid, volume['id'])
        self.a.volume_attach(uuid, volume)
        self.assertEqual(['vdb'], self.names(uuid))

    def test_from_the_start_and_after_a_reboot(self):
        device = self.device()
        uuid = self.run_container(volumes=[self.volume(device)])
        self.write(uuid, 'kept')
        self.a.kill(uuid)
        other = self.volume(self.device(), 'vdc')
        # Of one that is down it is only noted.
        self.a.volume_attach(uuid, other)
        self.a.prepare(uuid)
        self.attach(self.a, uuid)
        self.a.start_container(uuid)
        self.assertEqual(['vdb', 'vdc'], self.names(uuid))
        self.assertEqual('kept', self.sh(
            self.a, uuid, 'dd if=/dev/vdb bs=4 count=1 2>/dev/null'))
        self.sh(self.a, uuid, 'true')
        self.a.kill(uuid)
        self.a.volume_detach(uuid, other['id'])
        self.a.prepare(uuid)
        self.attach(self.a, uuid)
        self.a.start_container(uuid)
        self.assertEqual(['vdb'], self.names(uuid))

    def test_in_use(self):
        uuid = self.run_container()
        volume = self.volume(self.device())
        self.a.volume_attach(uuid, volume)
        self.sh(self.a, uuid, HOLD)
        error = self.refused(
            'in_use', self.a.volume_detach, uuid, volume['id'])
        self.assertIn('sleep', str(error))
        # Nothing has changed by that.
        self.write(uuid, 'still')
        self.sh(self.a, uuid, LET_GO)
        self.a.volume_detach(uuid, volume['id'])
        self.assertEqual([], self.names(uuid))

    def test_another_mount_of_it_is_of_no_use(self):
        """What a guest keeps of a volume opens nothing any more."""
        uuid = self.run_container(nesting=True)
        volume = self.volume(self.device())
        self.a.volume_attach(uuid, volume)
        self.sh(self.a, uuid,
                'touch /kept; mount --bind /dev/vdb /kept; '
                'setsid unshare -m sh -c "touch /run/other; sleep 1000" '
                '</dev/null >/dev/null 2>&1 & '
                'while [ ! -e /run/other ]; do sleep 0.05; done')
        self.a.volume_detach(uuid, volume['id'])
        # Some may end before they are looked at.
        mounts = self.sh(self.a, uuid, 'cat /proc/[0-9]*/mounts || :')
        self.assertIn('/proc', mounts)
        self.assertNotIn('/kept', mounts)
        self.a.volume_attach(uuid, volume)
        # A namespace that only a descriptor holds.
        self.sh(self.a, uuid,
                'touch /held; mount --bind /dev/vdb /held; '
                'setsid unshare -m sh -c '
                '"echo \\$\\$ > /run/there; exec sleep 1000" '
                '</dev/null >/dev/null 2>&1 & '
                'while [ ! -s /run/there ]; do sleep 0.05; done; '
                'setsid sh -c "exec 3< /proc/$(cat /run/there)/ns/mnt; '
                'touch /run/holds; sleep 1000" </dev/null >/dev/null 2>&1 & '
                'while [ ! -e /run/holds ]; do sleep 0.05; done; '
                'kill $(cat /run/there)')
        self.a.volume_detach(uuid, volume['id'])
        self.assertEqual([], self.names(uuid))
        enter = ('for p in /proc/[0-9]*; do if [ -e $p/fd/3 ]; then '
                 'nsenter --mount=$p/fd/3 {} && exit 0; fi; done; exit 1')
        self.sh(self.a, uuid, enter.format('grep -q /held /proc/mounts'))
        self.assertRaises(AssertionError, self.sh, self.a, uuid, enter.format(
            'dd if=/held of=/dev/null count=1'))

    def test_read_only(self):
        uuid = self.run_container()
        device = self.device()
        self.a.volume_attach(uuid, self.volume(device, read_only=True))
        self.sh(self.a, uuid, 'dd if=/dev/vdb of=/dev/null count=1')
        for attempt in (
                'echo wrong > /dev/vdb', 'chmod 666 /dev/vdb',
                'chown root /dev/vdb',
                'mount -o remount,bind,rw /dev/vdb; '
                'echo wrong | dd of=/dev/vdb conv=notrunc'):
            self.assertRaises(AssertionError, self.sh, self.a, uuid, attempt)
        self.assertEqual(bytes(5), device.read(5))

    def test_what_a_guest_makes_is_no_device(self):
        """The number of a device that it has not does not open one."""
        uuid = self.run_container()
        device = self.device()
        self.assertRaises(
            AssertionError, self.sh, self.a, uuid,
            'mknod /tmp/node b $(cat /sys/class/block/'
            f'{pathlib.Path(device.path).name}/dev | tr : " ")')

    def test_bad_ones(self):
        uuid = self.run_container()
        device = self.device()
        good = self.volume(device)
        self.a.volume_attach(uuid, good)
        for volume in (
                self.volume(device) | {'path': '/nowhere/volume'},
                self.volume(device, 'vdc') | {'path': '/etc/hostname'},
                self.volume(device, 'console'),
                self.volume(device, '../vdd'),
                self.volume(device, 'vdb')):
            self.refused('invalid', self.a.volume_attach, uuid, volume)
        self.sh(self.a, uuid, 'touch /dev/vdc')
        self.refused(
            'exists', self.a.volume_attach, uuid,
            self.volume(self.device(), 'vdc'))
        self.assertEqual(['vdb'], self.names(uuid))
        self.assertEqual([good['id']], [
            v['id'] for v in self.a.info(uuid)['volumes']])

    def test_of_the_host_itself(self):
        uuid = self.run_container()
        device = self.device()
        self.a.run('mkfs.ext4', '-q', device.path)
        directory = pathlib.Path(self.top, 'mounted')
        directory.mkdir()
        self.a.run('mount', device.path, str(directory))
        self.addCleanup(self.a.run, 'umount', str(directory))
        self.refused('invalid', self.a.volume_attach, uuid,
                     self.volume(device))

    def test_two_have_one(self):
        device = self.device()
        one, two = (self.run_container() for _ in range(2))
        self.a.volume_attach(one, self.volume(device))
        self.a.volume_attach(two, self.volume(device, 'vdc'))
        self.write(one, 'shared')
        self.assertEqual('shared', self.sh(
            self.a, two, 'dd if=/dev/vdc bs=6 count=1 iflag=direct '
            '2>/dev/null || dd if=/dev/vdc bs=6 count=1 2>/dev/null'))

    def test_migrated(self):
        """It moves with its volumes, and not with one open."""
        device = self.device()
        spec = self.spec()['resources']
        uuid = self.run_container(
            volumes=[self.volume(device)],
            resources={**spec, 'disk_io': {
                'read_iops': 900 if base.limits_io() else None}})
        added = self.volume(self.device(), 'vdc')
        self.a.volume_attach(uuid, added)
        self.sh(self.a, uuid, HOLD)
        [problem] = self.a.migration_check_source(uuid)['problems']
        self.assertEqual('device', problem['name'])
        self.assertIn('/dev/vdb', problem['reason'])
        self.sh(self.a, uuid, LET_GO)
        here, there = self.a, self.b
        for turn in range(2):
            self.migrate(uuid, here, there)
            here, there = there, here
            self.assertEqual(['vdb', 'vdc'], self.names(uuid, here))
            if base.limits_io():
                self.assertEqual([900] * 3, self.speeds(uuid, here))
            self.write(uuid, f'turn {turn}', host=here)
            self.assertEqual(f'turn {turn}'.encode(), device.read(6))
        self.a.volume_detach(uuid, added['id'])
        self.assertEqual(['vdb'], self.names(uuid))
        self.migrate(uuid, self.a, self.b)
        self.assertEqual(['vdb'], self.names(uuid, self.b))

    def test_suspended(self):
        device = self.device()
        uuid = self.run_container(volumes=[self.volume(device)])
        self.a.suspend(uuid)
        self.refused('bad_state', self.a.volume_attach, uuid,
                     self.volume(device, 'vdc'))
        self.a.resume(uuid)
        self.write(uuid, 'resumed')
        self.assertEqual(b'resumed', device.read(7))


class FailuresTestCase(base.HostTestCase):

    def test_a_step_that_fails_leaves_nothing(self):
        uuid = self.run_container()
        device = loop.Loop(self.config.state_dir / 'volume')
        self.addCleanup(device.close)
        volume = {'id': 'volume', 'name': 'vdb', 'path': device.path}
        seen = []
        self.addCleanup(setattr, revert, 'fault_hook', None)
        revert.fault_hook = seen.append
        self.host.volumes.attach(uuid, volume)
        self.host.volumes.detach(uuid, 'volume')
        steps = [step for step in seen if step.startswith('volume-')]
        self.assertEqual(4, len(steps))
        for step in steps:
            def fail(name, step=step):
                if name == step:
                    raise OSError(f'no {name}')

            revert.fault_hook = fail
            self.assertRaises(
                (OSError, errors.ContainerError), self.host.volumes.attach,
                uuid, volume)
            self.assertEqual([], self.host.info(uuid)['volumes'], step)
            self.assertEqual('', self.sh(uuid, 'ls /dev | grep vdb || :'))
        revert.fault_hook = None
        self.host.volumes.attach(uuid, volume)
        self.sh(uuid, 'dd if=/dev/vdb of=/dev/null count=1')
