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

"""Servers whose root is a volume: real file systems on real block devices.

Cinder is Nova's fixture, and the devices are loop devices, as in
:mod:`.test_volumes`.
"""

import contextlib
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import threading

import fixtures
from nova.tests.fixtures import cinder

from tests import cases
from tests.functional import agents
from tests.functional import base
from tests.functional import test_volumes
from tests import loop
from tests import tarballs

SIZE = 48 * loop.MIB


def run(*argv):
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=60).stdout


class TestCase(test_volumes.TestCase):

    agent_options = {'volume_filesystems': 'ext4'}

    def system(self, size=SIZE, **values):
        """A volume with the root of a small system, and its device."""
        ident, device = self.volume(size=size, **values)
        self.make_system(device.path)
        return ident, device

    def make_system(self, path, *options, mark='of the volume'):
        with self.tree(mark) as tree:
            run('mkfs.ext4', '-q', '-F', *options, '-d', tree, str(path))

    @contextlib.contextmanager
    def tree(self, mark='of the volume'):
        with tempfile.TemporaryDirectory(dir=agents.WORK) as tree:
            tarballs.unpack(self.image_data(), tree)
            pathlib.Path(tree, 'mark').write_text(mark)
            yield tree

    @staticmethod
    @contextlib.contextmanager
    def mounted(device, kind='ext4'):
        """What is on a volume, as whoever has it next sees it."""
        with tempfile.TemporaryDirectory(dir='/run') as place:
            run('mount', '-t', kind, device.path, place)
            try:
                yield pathlib.Path(place)
            finally:
                run('umount', place)

    def boot_from(self, ident, status='ACTIVE', **values):
        server = self.api.post_server({'server': {
            'name': 'bfv', 'flavorRef': self.flavor, 'networks': 'none',
            'imageRef': '', 'block_device_mapping_v2': [{
                'boot_index': 0, 'uuid': ident, 'source_type': 'volume',
                'destination_type': 'volume'}], **values,
            'host': 'host1'}})
        return self.wait(server, status)

    def here(self, script, server):
        return self.sh(server, script, self.host(server))

    def refused(self, ident, *texts):
        """The server is refused with these words, and nothing is left."""
        fault = str(self.boot_from(ident, 'ERROR')['fault'])
        for text in texts:
            self.assertIn(text, fault)
        for host in base.HOSTS:
            self.assert_nothing_left(host)


class LifeTest(TestCase):

    def test_life(self):
        ident, device = self.system()
        data, other = self.volume()
        server = self.boot_from(ident, block_device_mapping_v2=[
            {'boot_index': 0, 'uuid': ident, 'source_type': 'volume',
             'destination_type': 'volume'},
            {'boot_index': -1, 'uuid': data, 'source_type': 'volume',
             'destination_type': 'volume'}])
        info = self.info(server)
        self.assertEqual((ident, 'volume', ''), (
            info['root']['id'], info['disk']['method'], info['layer']))
        self.assertEqual({data: 'vdb'}, self.had(server))
        self.assert_wrote(server, other, 'data')
        self.assertEqual('of the volume', self.here('cat /mark', server))
        # Not even its own root has its device.
        self.assertEqual('', self.here('ls /dev | grep vda || :', server))
        mounted = self.here('grep " / " /proc/mounts', server)
        self.assertIn(' ext4 ', mounted)
        self.assertIn('nodev', mounted)
        self.assertNotIn('nosuid', mounted)
        self.here('echo first > /root/file; chown 7:8 /root/file', server)
        self.action(server, 'SHUTOFF', 'os-stop')
        with self.mounted(device) as root:
            status = os.stat(root / 'root/file')
            # The ids of the guest, not those of this host.
            self.assertEqual((7, 8), (status.st_uid, status.st_gid))
            (root / 'root/file').write_text('second')
        self.action(server, 'ACTIVE', 'os-start')
        self.assertEqual('second', self.here('cat /root/file', server))
        for kind in ('SOFT', 'HARD'):
            self.here(f'echo {kind} > /root/file', server)
            self.action(server, 'ACTIVE', 'reboot', {'type': kind})
            self.assertEqual(kind, self.here('cat /root/file', server))
        self.action(server, 'PAUSED', 'pause')
        self.action(server, 'ACTIVE', 'unpause')
        self.assertEqual('HARD', self.here('cat /root/file', server))
        self.delete(server)
        self.assert_nothing_left()
        with self.mounted(device) as root:
            self.assertEqual('HARD\n', (root / 'root/file').read_text())

    @cases.more
    def test_xfs(self):
        """Also of a clone of a volume, which has the same ids."""
        if not shutil.which('mkfs.xfs'):
            self.skipTest('needs xfsprogs')
        self.configure_agent('host1', volume_filesystems='ext4,xfs')
        # The smallest that there is.
        ident, device = self.volume(size=320 * loop.MIB)
        run('mkfs.xfs', '-q', device.path)
        with self.tree() as tree, self.mounted(device, 'xfs') as place:
            run('cp', '-a', f'{tree}/.', str(place))
        clone, other = self.volume(size=320 * loop.MIB)
        run('dd', f'if={device.path}', f'of={other.path}', 'bs=1M',
            'oflag=direct')
        for server in self.boot_from(ident), self.boot_from(clone):
            self.assertIn(' xfs ', self.here(
                'grep " / " /proc/mounts', server))
            self.here('echo own > /root/file; chown 7 /root/file', server)
            self.delete(server)
        self.assert_nothing_left()
        with self.mounted(other, 'xfs') as root:
            self.assertEqual(7, os.stat(root / 'root/file').st_uid)

    @cases.more
    def test_suspend(self):
        ident, _ = self.system()
        server = self.boot_from(ident)
        self.here('touch /run/memory /root/disk', server)
        self.action(server, 'SUSPENDED', 'suspend')
        self.action(server, 'ACTIVE', 'resume')
        self.here('test -e /run/memory && test -e /root/disk', server)
        self.here('echo more > /root/disk; sync', server)
        self.delete(server)
        self.assert_nothing_left()

    @cases.more
    def test_host_boots(self):
        self.flags(resume_guests_state_on_host_boot=True)
        ident, _ = self.system()
        server = self.boot_from(ident)
        self.here('echo own > /root/file; sync', server)
        self.computes['host1'].stop()
        self.agents.power_off_inside('host1', server['id'])
        self.agents.stop('host1')
        self.agents.start('host1')
        self.computes['host1'] = self.start_service('compute', host='host1')
        self.wait_for(lambda: self.info(server)['state'] == 'running',
                      'the resume')
        self.assertEqual('own', self.here('cat /root/file', server))

    @cases.more
    def test_agent_restarts(self):
        """The guest goes on, and its volume is let go when it ends."""
        ident, device = self.system()
        server = self.boot_from(ident)
        self.agents.stop('host1')
        self.agents.start('host1')
        self.here('echo own > /root/file', server)
        self.action(server, 'SHUTOFF', 'os-stop')
        with self.mounted(device) as root:
            self.assertEqual('own\n', (root / 'root/file').read_text())
        self.action(server, 'ACTIVE', 'os-start')
        self.agents.stop('host1')
        self.agents.start('host1')
        self.delete(server)
        self.assert_nothing_left()
        with self.mounted(device):
            pass


class MovesTest(TestCase):

    def test_rescue(self):
        ident, device = self.system()
        server = self.boot_from(ident)
        self.here('echo own > /root/file; chown 7:8 /root/file', server)
        image = self.make_image(
            self.image_data() + b'\0' * 1024, properties={
                'hw_rescue_device': 'disk', 'hw_rescue_bus': 'virtio'})
        with base.microversion(self.api, '2.87'):
            self.action(server, 'RESCUE', 'rescue', {
                'rescue_image_ref': image})
        info = self.info(server)
        self.assertEqual((True, image, ident), (
            info['rescue'], info['image_id'], info['root']['id']))
        self.assertEqual('own 7 8', self.here(
            'echo $(cat /mnt/root/file) $(stat -c "%u %g" /mnt/root/file)',
            server))
        self.assertEqual('', self.here('ls /root', server))
        self.here('echo repaired > /mnt/root/file; touch /scratch', server)
        self.agents.stop('host1')
        self.agents.start('host1')
        self.action(server, 'ACTIVE', 'unrescue')
        self.assertEqual('repaired', self.here('cat /root/file', server))
        self.assertEqual('', self.here('ls /scratch || true', server))
        self.delete(server)
        self.assert_nothing_left()
        with self.mounted(device):
            pass

    @cases.more
    def test_rescue_of_what_cannot_be_mounted(self):
        ident, device = self.system()
        server = self.boot_from(ident)
        self.action(server, 'SHUTOFF', 'os-stop')
        good = device.read(loop.MIB)
        with open(device.path, 'r+b') as f:
            f.write(bytes(loop.MIB))
            f.flush()
            os.fsync(f.fileno())
        self.api.post_server_action(server['id'], {'os-start': None})
        self.wait_for(lambda: 'no file system' in self.reason(server),
                      'the refusal')
        self.assertEqual([], [line for line in self.agents.leftovers('host1')
                              if '/root/' in line])
        image = self.make_image(self.image_data() + b'\0' * 1024, properties={
            'hw_rescue_device': 'disk', 'hw_rescue_bus': 'virtio'})
        with base.microversion(self.api, '2.87'):
            self.action(server, 'RESCUE', 'rescue', {
                'rescue_image_ref': image})
        self.assertEqual('', self.here('ls /mnt', server))
        # In place of fsck, which the image does not have.
        done = self.agents.client('host1').exec(
            server['id'], ['dd', 'of=/dev/vda', 'bs=1M', 'conv=fsync'],
            stdin=good)
        self.assertEqual(0, done['exit_code'], done['stderr'])
        self.action(server, 'ACTIVE', 'unrescue')
        self.assertEqual('of the volume', self.here('cat /mark', server))
        self.delete(server)
        self.assert_nothing_left()

    def test_cold_migration(self):
        ident, device = self.system()
        server = self.boot_from(ident)
        self.here('echo one > /root/file', server)
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.assertEqual('one', self.here('cat /root/file', server))
        self.assertEqual('stopped', self.info(server, 'host1')['state'])
        self.here('echo two > /root/file', server)
        self.action(server, 'ACTIVE', 'revertResize')
        self.assertEqual('host1', self.host(server))
        self.assertEqual('two', self.here('cat /root/file', server))
        self.action(server, 'VERIFY_RESIZE', 'migrate', {'host': 'host2'})
        self.api.post_server_action(server['id'], {'confirmResize': None})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'the end')
        self.assert_nothing_left('host1')
        self.assertEqual('two', self.here('cat /root/file', server))
        # Nothing of an image has come to either host.
        for host in base.HOSTS:
            self.assertEqual(0, self.agents.imports(host))
        self.delete(server)
        self.assert_nothing_left('host2')
        with self.mounted(device) as root:
            self.assertEqual('two\n', (root / 'root/file').read_text())

    @cases.more
    def test_evacuate(self):
        ident, _ = self.system()
        server = self.boot_from(ident)
        self.here('echo own > /root/file', server)
        self.admin_api.microversion = '2.95'
        service = self.service('host1')
        self.computes['host1'].stop()
        # As whoever evacuates a host has to make sure of.
        self.agents.power_off_inside('host1', server['id'])
        self.admin_api.put_service(service['id'], {'forced_down': True})
        self.admin_api.post_server_action(server['id'], {'evacuate': {}})
        self.wait_for(lambda: self._settled(server, 'SHUTOFF') and
                      self.host(server) == 'host2', 'the evacuation')
        self.action(server, 'ACTIVE', 'os-start')
        self.assertEqual('own', self.here('cat /root/file', server))
        self.computes['host1'] = self.start_service('compute', host='host1')
        self.wait_for(
            lambda: not self.agents.client('host1').list(), 'the clean-up')
        self.assertEqual('own', self.here('cat /root/file', server))
        self.delete(server)
        self.assert_nothing_left('host2')

    @cases.more
    def test_resize(self):
        """Also to a flavor whose disk is smaller: the volume is no part."""
        ident, _ = self.system()
        server = self.boot_from(ident)
        flavor = self._create_flavor(
            memory_mb=300, vcpu=1, disk=0, ephemeral=0)
        self.action(server, 'VERIFY_RESIZE', 'resize', {'flavorRef': flavor})
        self.api.post_server_action(server['id'], {'confirmResize': None})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'the end')
        self.assertEqual('of the volume', self.here('cat /mark', server))
        self.assertEqual(300 << 20, self.info(
            server, self.host(server))['resources']['memory_bytes'])

    def test_live_migration_is_refused(self):
        ident, _ = self.system()
        server = self.boot_from(ident)
        self.migrate(server, 'host2')
        self.wait_for_migration(server, 'error', 'failed')
        self.assertIn('Migrate it cold', self.reason(server))
        self.assertEqual('host1', self.host(server))
        self.assertEqual('of the volume', self.here('cat /mark', server))
        self.assert_nothing_left('host2')

    @cases.more
    def test_shelve(self):
        ident, _ = self.system()
        server = self.boot_from(ident)
        self.here('echo own > /root/file', server)
        self.action(server, 'SHELVED_OFFLOADED', 'shelve')
        self.assert_nothing_left()
        self.action(server, 'ACTIVE', 'unshelve')
        self.assertEqual('own', self.here('cat /root/file', server))


class RebuildTest(TestCase):

    def setUp(self):
        super().setUp()
        self.devices = {}
        self.useFixture(fixtures.MonkeyPatch(
            'nova.volume.cinder.API.reimage_volume', self._reimage))

    def _reimage(self, context, volume, image, reimage_reserved=False):
        """What Cinder does: the image's data go onto the volume."""
        device, server = self.devices[volume]
        with open(device.path, 'r+b') as f:
            f.write(self.glance._imagedata[image])
            f.flush()
            os.fsync(f.fileno())
        # Nova waits for it in the thread that has called us.
        threading.Thread(
            target=self.api.create_server_external_events, kwargs={
                'events': [{'name': 'volume-reimaged', 'tag': volume,
                            'server_uuid': server['id']}]}).start()

    def image_of_volume(self, mark):
        """An image for volumes: a file system."""
        file = pathlib.Path(self.top.name, 'image')
        with open(file, 'wb') as f:
            f.truncate(SIZE)
        self.make_system(file, mark=mark)
        data = file.read_bytes()
        file.unlink()
        image = self.make_image(data)
        self.glance._imagedata[image] = data
        return image

    def test_rebuild(self):
        ident, device = self.system()
        server = self.boot_from(ident)
        self.devices[ident] = device, server
        self.here('touch /root/file', server)
        image = self.image_of_volume('of the image')
        self.at_home(server)
        with base.microversion(self.api, '2.93'):
            self.action(server, 'ACTIVE', 'rebuild', {'imageRef': image})
        self.assertEqual('of the image', self.here('cat /mark', server))
        self.assertEqual('', self.here('ls /root', server))
        self.delete(server)
        self.assert_nothing_left()


class SnapshotTest(TestCase):

    def setUp(self):
        super().setUp()
        self.seen = []
        # Nova's tests keep theirs to themselves.
        self.cinder = self.useFixture(cinder.CinderFixture(self))
        # Before Nova's fixture is asked, which has no data.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.volume.cinder.API.create_snapshot_force', self._snapshot))
        self.error = None

    def _snapshot(self, context, volume, name, description):
        """What Cinder does: what is on the device at a moment, copied."""
        server, device = self.server
        self.seen.append(self.info(server)['quiesced'])
        if self.error is not None:
            raise self.error
        ident, copy = self.volume(size=SIZE)
        run('dd', f'if={device.path}', f'of={copy.path}', 'bs=1M',
            'iflag=direct', 'oflag=direct')
        self.copy = ident, copy
        return self.cinder.fake_create_snapshot_force(
            context, volume, name, description)

    def running(self, what='while :; do echo >> /root/count; done'):
        """A server that writes."""
        # One that Cinder knows more of.
        ident, device = self.system(ident=self.cinder.fake_vol_create(
            None, 1, 'root', 'of a server')['id'])
        server = self.boot_from(ident)
        self.server = server, device
        self.here(f'setsid sh -c "{what}" </dev/null >/dev/null 2>&1 &',
                  server)
        return server

    def image_of(self, server, status='active'):
        made = self.api.post_server_action(server['id'], {
            'createImage': {'name': 'snap'}})
        return self.glance.images[made['image_id']]

    def assert_goes_on(self, server):
        before = self.here('wc -c < /root/count', server)
        self.wait_for(
            lambda: self.here('wc -c < /root/count', server) != before,
            'what it writes')
        self.assertFalse(self.info(server)['quiesced'])

    def test_snapshot(self):
        server = self.running()
        self.here('echo unsynced > /root/file', server)
        image = self.image_of(server)
        self.assertEqual([True], self.seen)
        [mapping] = image['properties']['block_device_mapping']
        self.assertEqual('snapshot', mapping['source_type'])
        self.assertEqual('ACTIVE', self.api.get_server(
            server['id'])['status'])
        self.assert_goes_on(server)
        # Nova did not see it stand still.
        self.periodic('_sync_power_states')
        self.assertEqual(1, self.api.get_server(
            server['id'])['OS-EXT-STS:power_state'])
        other = self.boot_from(self.copy[0])
        self.assertEqual('unsynced', self.here('cat /root/file', other))
        self.assert_goes_on(server)

    @cases.more
    def test_failed_snapshot(self):
        server = self.running()
        self.error = ValueError('no room')
        self.api.post_server_action(
            server['id'], {'createImage': {'name': 'snap'}},
            check_response_status=[500])
        self.assertEqual([True], self.seen)
        self.wait_for(lambda: not self.info(server)['quiesced'], 'the end')
        self.assert_goes_on(server)

    @cases.more
    def test_nobody_ends_it(self):
        """It goes on by itself: after a time, and for whatever changes it."""
        server = self.running()
        client = self.agents.client('host1')
        client.quiesce(server['id'], 3600)
        self.assertEqual((True, 'running'), tuple(
            self.info(server)[key] for key in ('quiesced', 'state')))
        self.action(server, 'PAUSED', 'pause')
        client.unquiesce(server['id'])
        self.assertEqual('paused', self.info(server)['state'])
        self.action(server, 'ACTIVE', 'unpause')
        self.assert_goes_on(server)
        client.quiesce(server['id'], 0.5)
        self.wait_for(lambda: not self.info(server)['quiesced'], 'the end')
        self.assert_goes_on(server)
        client.quiesce(server['id'], 3600)
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        client.quiesce(server['id'], 3600)
        self.delete(server)
        self.assert_nothing_left()

    @cases.more
    def test_agent_is_killed(self):
        server = self.running()
        self.agents.client('host1').quiesce(server['id'], 3600)
        self.agents.stop('host1')
        self.agents.start('host1')
        self.assert_goes_on(server)


class RefusedTest(TestCase):

    def test_not_permitted(self):
        for host in base.HOSTS:
            self.configure_agent(host, volume_filesystems='')
        self.refused(self.system()[0], '[pycontainer]volume_filesystems')

    @cases.more
    def test_type_that_is_not_permitted(self):
        ident, device = self.volume(size=SIZE)
        run('mkfs.ext2', '-q', device.path)
        self.refused(ident, 'type ext2', 'mounts only ext4')

    @cases.more
    def test_no_file_system(self):
        self.refused(self.volume()[0], 'no file system')

    @cases.more
    def test_partitions(self):
        ident, device = self.volume()
        with open(device.path, 'r+b') as f:
            # One Linux partition from the first MiB on, and the signature.
            f.seek(446)
            f.write(struct.pack('<B3sB3sII', 0, b'', 0x83, b'', 2048, 8192))
            f.seek(510)
            f.write(b'\x55\xaa')
        self.refused(ident, 'has partitions (dos)')

    @cases.more
    def test_no_init(self):
        ident, device = self.volume(size=SIZE)
        run('mkfs.ext4', '-q', device.path)
        self.refused(ident, 'has no init')

    def test_corrupt(self):
        ident, device = self.volume(size=SIZE)
        self.make_system(device.path, '-b', '4096')
        with open(device.path, 'r+b') as f:
            # The block group descriptors.
            f.seek(4096)
            f.write(b'\xa5' * 4096)
            f.flush()
            os.fsync(f.fileno())
        self.refused(ident, 'the kernel does not mount the ext4')

    @cases.more
    def test_multiattach(self):
        ident, device = self.system(ident=cinder.CinderFixture.MULTIATTACH_VOL)
        self.refused(ident, 'several servers')
