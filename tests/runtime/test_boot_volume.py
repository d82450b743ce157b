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

"""Containers whose root is a volume: file systems that others have made."""

import contextlib
import os
import pathlib
import subprocess
import tempfile
import uuid as uuidlib

import fixtures

from nova_pycontainer.runtime import container
from tests import loop
from tests.runtime import base
from tests import tarballs

_SIZE = 48 * loop.MIB


def run(*argv):
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=60).stdout


class TestCase(base.HostTestCase):

    def device(self, size=_SIZE):
        file = self.config.state_dir.parent / f'{uuidlib.uuid4()}.img'
        made = loop.Loop(file, size)
        self.addCleanup(made.close)
        return made

    @contextlib.contextmanager
    def tree(self):
        with tempfile.TemporaryDirectory(
                dir=self.config.state_dir.parent) as tree:
            tarballs.unpack(base.image('busybox').read_bytes(), tree)
            yield pathlib.Path(tree)

    def system(self, *options):
        device = self.device()
        with self.tree() as tree:
            run('mkfs.ext4', '-q', *options, '-d', str(tree), device.path)
        return device

    def root(self, device, **values):
        return {'layer': None, 'root': {
            'id': str(uuidlib.uuid4()), 'name': 'vda', 'path': device.path,
            **values}}

    def boot(self, device, **values):
        return self.run_container(**self.root(device), **values)

    def refused(self, code, device, *texts, **values):
        error = self.assert_code(
            code, self.host.define, str(uuidlib.uuid4()),
            self.spec(**self.root(device, **values)))
        for text in texts:
            self.assertIn(text, str(error))
        self.assertEqual([], self.host.list())
        self.assert_free(device)

    def assert_free(self, device):
        """The kernel has let go of it."""
        os.close(os.open(device.path, os.O_RDONLY | os.O_EXCL))


class BootVolumeTestCase(TestCase):

    options = {'volume_filesystems': ('ext4',)}

    def test_guest_reboots(self):
        device = self.system()
        uuid = self.boot(device)
        self.wait_started(uuid)
        first = self.host.info(uuid)['pid']
        self.sh(uuid, 'echo own > /root/file')
        self.sh_end(uuid, 'reboot')
        base.wait_for(
            lambda: self.state(uuid) == 'running' and
            self.host.info(uuid)['pid'] != first, 'the reboot')
        self.assertEqual('own', self.sh(uuid, 'cat /root/file'))
        self.host.kill(uuid)
        self.assert_free(device)
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_what_it_says_of_itself(self):
        """Neither its device nodes nor its wishes for errors count."""
        device = self.device()
        secret = self.device(loop.MIB)
        number = os.stat(secret.path).st_rdev
        with self.tree() as tree:
            os.mknod(tree / 'node', 0o60666, number)
            run('mkfs.ext4', '-q', '-d', str(tree), device.path)
        run('tune2fs', '-e', 'panic', '-E', 'mount_opts=errors=panic',
            device.path)
        uuid = self.boot(device)
        self.assertIn('Permission denied', self.sh(
            uuid, 'cat /node 2>&1 || :'))
        with open('/proc/self/mounts') as f:
            [line] = [line for line in f if f'/root/{uuid} ' in line]
        self.assertIn('nodev', line)
        self.assertNotIn('panic', line)

    def test_journal_on_another_device(self):
        device, journal = self.device(), self.device()
        run('mke2fs', '-q', '-b', '4096', '-O', 'journal_dev', journal.path)
        run('mkfs.ext4', '-q', '-b', '4096', '-J', f'device={journal.path}',
            device.path)
        self.refused('volume_unusable', device, 'is on another device')

    def test_only_to_be_read(self):
        self.refused('volume_unusable', self.system(), 'may only be read',
                     read_only=True)

    def test_not_connected(self):
        device = self.device()
        error = self.assert_code(
            'invalid', self.host.define, str(uuidlib.uuid4()), self.spec(
                **self.root(device, path='/dev/no-such')))
        self.assertIn('is not connected', str(error))
        self.assertEqual([], self.host.list())

    def test_only_one_has_it(self):
        device = self.system()
        volume = {'id': str(uuidlib.uuid4()), 'name': 'vdb',
                  'path': device.path}
        other = self.run_container(volumes=[volume])
        self.assert_code(
            'in_use', self.host.define, str(uuidlib.uuid4()),
            self.spec(**self.root(device)))
        self.host.volumes.detach(other, volume['id'])
        uuid = self.boot(device)
        self.assert_code(
            'invalid', self.host.volumes.attach, other, volume)
        self.assert_code(
            'invalid', self.host.define, str(uuidlib.uuid4()),
            self.spec(**self.root(device)))
        self.assertEqual('running', self.state(uuid))

    def test_start_that_fails(self):
        device = self.system()
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec(**self.root(device)))
        self.assert_free(device)

        def fails(*args):
            raise OSError('no bundle')

        with fixtures.MonkeyPatch(
                'nova_pycontainer.runtime.container.Container._write_bundle',
                fails):
            self.assert_code('internal', self.host.prepare, uuid)
        self.assert_free(device)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.sh(uuid, 'true')

    def test_agent_dies_while_it_is_mounted(self):
        device = self.system()
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec(**self.root(device)))
        item = self.host.entry(uuid).container
        self.assertIsInstance(item, container.Container)
        item.mount_root(item.root)
        self.assertRaises(OSError, self.assert_free, device)
        self.host.close()
        self.host = self.make_host()
        self.assert_free(device)
        self.host.prepare(uuid)
        self.host.start_container(uuid)

    def test_volume_changes_while_it_is_down(self):
        """What is there is looked at before each start."""
        device = self.system()
        uuid = self.boot(device)
        self.host.kill(uuid)
        run('mkfs.ext4', '-q', '-F', device.path)
        error = self.assert_code('volume_unusable', self.host.prepare, uuid)
        self.assertIn('has no init', str(error))
        run('wipefs', '-a', device.path)
        error = self.assert_code('volume_unusable', self.host.prepare, uuid)
        self.assertIn('no file system', str(error))
        self.assertEqual('stopped', self.state(uuid))
        self.assert_free(device)
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))


class NotPermittedTestCase(TestCase):
    """As it is without a word of the operator's."""

    def test_it_is_refused(self):
        self.refused('volume_unusable', self.system(),
                     '[pycontainer]volume_filesystems')
