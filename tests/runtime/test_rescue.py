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

"""Rescue: another root for a while, with the own one in /mnt."""

import contextlib
import io
import uuid as uuidlib

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions
from tests.runtime import base
from tests import tarballs


class RescueTestCase(base.HostTestCase):

    def rescue(self, uuid, **more):
        return self.host.rescues.begin(uuid, {
            'layer': self.layer('busybox'), 'image_id': 'rescue',
            'init': None, 'config_drive': None, **more})

    def start(self, uuid):
        self.host.prepare(uuid)
        return self.host.start_container(uuid)

    def stopped_container(self):
        uuid = self.run_container()
        self.sh(uuid, 'echo own > /root/file; chown 1000:1001 /root/file; '
                'rm /etc/os-release')
        self.host.stop(uuid, 30)
        return uuid

    def test_from_rescue_to_unrescue(self):
        uuid = self.stopped_container()
        self.assertTrue(self.rescue(uuid)['rescue'])
        self.assertEqual('stopped', self.state(uuid))
        info = self.start(uuid)
        self.assertEqual(('running', True, 'rescue'), (
            info['state'], info['rescue'], info['image_id']))
        # The root of the other image, untouched by what the guest did.
        self.assertEqual('', self.sh(uuid, 'ls /root'))
        self.assertNotEqual('', self.sh(uuid, 'cat /etc/os-release'))
        # Its own, with the right owners, and to be written.
        self.assertEqual('own 1000 1001', self.sh(
            uuid, 'echo $(cat /mnt/root/file) '
            '$(stat -c "%u %g" /mnt/root/file)'))
        self.assertEqual('new', self.sh(
            uuid, 'echo new > /mnt/etc/os-release; touch /scratch; '
            'chroot /mnt /bin/busybox cat /etc/os-release'))
        self.sh(uuid, 'mkdir /mnt/made; chown 5:6 /mnt/made; sync')
        # However often it starts in between.
        self.host.reboot(uuid, 30)
        self.assertEqual('own', self.sh(uuid, 'cat /mnt/root/file'))
        self.assertEqual('/scratch', self.sh(uuid, 'ls /scratch'))
        info = self.host.rescues.end(uuid)
        self.assertEqual(('stopped', False), (info['state'], info['rescue']))
        self.assertFalse(
            (self.config.instances_dir / uuid / 'rescue').exists())
        self.start(uuid)
        self.assertEqual('new', self.sh(uuid, 'cat /etc/os-release'))
        self.assertEqual('5 6', self.sh(uuid, 'stat -c "%u %g" /made'))
        self.assertEqual('', self.sh(uuid, 'ls /scratch || true'))
        self.assertEqual('', self.sh(uuid, 'ls /mnt'))
        # Nothing is left to be ended.
        self.host.stop(uuid, 30)
        self.assertFalse(self.host.rescues.end(uuid)['rescue'])

    def test_its_own_disk_is_full(self):
        uuid = self.run_container(disk=64 * base.MIB)
        self.sh(uuid, 'dd if=/dev/zero of=/full bs=1M', check=False)
        self.host.stop(uuid, 30)
        self.rescue(uuid)
        self.start(uuid)
        self.sh(uuid, 'dd if=/dev/zero of=/file bs=1M count=16; '
                'rm /mnt/full; sync')
        self.host.rescues.end(uuid)
        self.start(uuid)
        self.sh(uuid, 'dd if=/dev/zero of=/file bs=1M count=16')

    def test_agent_ends_and_host_boots(self):
        uuid = self.stopped_container()
        self.rescue(uuid)
        pid = self.start(uuid)['pid']
        self.host.close()
        self.host = self.make_host()
        info = self.host.info(uuid)
        self.assertEqual(('running', pid, True), (
            info['state'], info['pid'], info['rescue']))
        self.assertEqual('own', self.sh(uuid, 'cat /mnt/root/file'))
        # As after a boot of the host: it is down, and only the disk knows.
        self.host.stop(uuid, 30)
        self.host.close()
        self.host = self.make_host()
        self.start(uuid)
        self.assertEqual('own', self.sh(uuid, 'cat /mnt/root/file'))
        self.host.rescues.end(uuid)
        self.start(uuid)
        self.assertEqual('own', self.sh(uuid, 'cat /root/file'))

    def test_end_that_was_cut_off(self):
        uuid = self.stopped_container()
        left = self.config.instances_dir / uuid / 'rescue'
        left.mkdir()
        (left / 'file').touch()
        self.host.close()
        self.host = self.make_host()
        self.assertFalse(left.exists())

    def test_delete(self):
        for started in (True, False):
            uuid = self.stopped_container()
            self.rescue(uuid)
            if started:
                self.start(uuid)
            self.host.delete(uuid)
            self.assertEqual([], self.traces(uuid))

    def test_twice(self):
        uuid = self.stopped_container()
        self.rescue(uuid)
        self.start(uuid)
        self.sh(uuid, 'touch /first; sync')
        self.host.stop(uuid, 30)
        self.rescue(uuid)
        self.start(uuid)
        self.assertEqual('own', self.sh(
            uuid, 'ls /first; cat /mnt/root/file'))

    def test_guest_that_reboots(self):
        uuid = self.stopped_container()
        self.rescue(uuid)
        self.start(uuid)
        seen = self.host.events(-1, 0)[-1].seq
        self.sh_end(uuid, 'reboot')
        self.assertEqual(
            'rebooted', self.host.events(seen, base.PATIENCE)[0].type)
        self.assertEqual('own', self.sh(uuid, 'cat /mnt/root/file'))

    def test_config_drive_of_its_own(self):
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec(config_drive={'which': 'b3du'}))
        self.rescue(uuid, config_drive={'which': 'cmVzY3Vl'})
        self.start(uuid)
        self.assertEqual('rescue', self.sh(uuid, 'cat /config-drive/which'))
        self.host.rescues.end(uuid)
        self.start(uuid)
        self.assertEqual('own', self.sh(uuid, 'cat /config-drive/which'))

    def test_refusals(self):
        uuid = self.run_container()
        self.assert_code('bad_state', self.rescue, uuid)
        self.host.stop(uuid, 30)
        self.assert_code(
            'layer_missing', self.rescue, uuid, layer='sha256-' + 'a' * 64)
        self.assert_code('invalid', self.rescue, uuid, resources={})
        key = 'test-' + uuid.replace('-', '')
        self.addCleanup(self.host.layer_delete, key)
        self.addCleanup(self._delete_all)
        self.host.layer_import(key, io.BytesIO(
            tarballs.Tar(uid=0, gid=0).dir('./').add('./f').bytes()),
            image='x')
        self.assert_code('image_no_init', self.rescue, uuid, layer=key)
        self.assertFalse(self.host.info(uuid)['rescue'])
        self.rescue(uuid)
        self.assert_code(
            'bad_state', contextlib.ExitStack().enter_context,
            self.host.snapshots.take(uuid))
        # Neither of the two layers can be taken away.
        self.assert_code(
            'layer_in_use', self.host.layer_delete, self.layer('busybox'))
        self.start(uuid)
        self.assert_code('bad_state', self.host.checkpoints.suspend, uuid)
        error = self.assertRaises(
            errors.ContainerError, self.host.migrations.begin, uuid,
            str(uuidlib.uuid4()), versions.own())
        self.assertIn('rescue', error.message)


class LoopTestCase(RescueTestCase):
    """Where disks are file systems of their own."""

    disk_limit = 'loop'
