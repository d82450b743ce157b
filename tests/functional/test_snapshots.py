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

"""What Nova makes of snapshots: images, backups, shelved servers."""

import io
import itertools
import os
import struct
import tarfile

from nova_pycontainer import snapshot
from tests.functional import agents
from tests.functional import base
from tests.functional import images

RAW = 1 << 13
CHANGES = """
mkdir /data; echo kept > /data/file; chown 1000:1001 /data/file
chmod 4750 /data/file; ln /data/file /data/link
cp /bin/busybox /data/ping; rm -r /usr/share/doc
"""


class TestCase(base.TestCase):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        super().setUp()
        self.store = images.Store(self.glance)

    def boot(self, **values):
        return super().boot(networks='none', **values)

    def sh(self, server, script, host='host1'):
        done = self.agents.client(host).exec(
            server['id'], ['/bin/sh', '-c', script])
        self.assertEqual(0, done['exit_code'], done['stderr'])
        return done['stdout'].decode().strip()

    def change(self, server, host='host1'):
        """Change files of a server, which has done so itself by then."""
        self.wait_for(
            lambda: b'Start-up done' in self.agents.client(
                host).console_log(server['id']), 'its start-up script')
        self.sh(server, CHANGES, host)
        info = self.info(server, host)
        os.setxattr(
            f'/proc/{info["pid"]}/root/data/ping', 'security.capability',
            struct.pack('<6I', 0x03000001, RAW, 0, 0, 0, info['base_id']))

    def assert_changed(self, server, host='host1'):
        """It has the files of a server that was changed."""
        self.assertEqual(
            '1000 1001 4750 2', self.sh(
                server, 'stat -c "%u %g %a %h" /data/link', host))
        self.assertEqual('kept', self.sh(server, 'cat /data/link', host))
        self.assertEqual('gone', self.sh(
            server, 'test -e /usr/share/doc || echo gone', host))
        info = self.info(server, host)
        self.assertEqual(
            (0x03000001, RAW, info['base_id']), struct.unpack(
                '<II12xI', os.getxattr(
                    f'/proc/{info["pid"]}/root/data/ping',
                    'security.capability')))

    def image_of(self, server, **values):
        """Create an image of a server, and wait for it."""
        made = self.api.post_server_action(server['id'], {
            'createImage': {'name': 'snap', **values}})
        self.wait_for(
            lambda: self.glance.images[made['image_id']]['status'] ==
            'active', 'the image')
        self.wait_for(
            lambda: not self.api.get_server(server['id'])[
                'OS-EXT-STS:task_state'], 'the end of the snapshot')
        return made['image_id']

    def members(self, image_id):
        """What is in an image: everything that tar(5) tells of each name."""
        with tarfile.open(fileobj=io.BytesIO(
                self.store.data(image_id))) as archive:
            return {member.name: member.get_info() | member.pax_headers | {
                'data': archive.extractfile(member).read()
                if member.isreg() else None} for member in archive}


class SnapshotsTest(TestCase):

    def test_a_server_of_a_snapshot(self):
        self.image = self.make_image(
            self.image_data(), properties={'pycontainer_init': '/sbin/init'},
            container_format='docker')
        server = self.boot()
        self.change(server)
        image_id = self.image_of(server, metadata={'mine': 'yes'})
        image = self.glance.images[image_id]
        self.assertEqual(('raw', 'bare', 'snap'), (
            image['disk_format'], image['container_format'], image['name']))
        self.assertEqual(
            ('/sbin/init', 'yes', 'snapshot', server['id']), tuple(
                image['properties'][name] for name in (
                    'pycontainer_init', 'mine', 'image_location',
                    'instance_uuid')))
        self.assertEqual('ACTIVE', self.api.get_server(
            server['id'])['status'])
        self.assertEqual('running', self.info(server)['state'])
        second = self.boot(host='host2', image=image_id)
        self.assert_changed(second, 'host2')

    def test_in_every_state(self):
        server = self.boot()
        self.change(server)
        self.action(server, 'PAUSED', 'pause')
        paused = self.image_of(server)
        self.assertEqual('paused', self.info(server)['state'])
        self.action(server, 'ACTIVE', 'unpause')
        self.action(server, 'SUSPENDED', 'suspend')
        self.image_of(server)
        self.action(server, 'ACTIVE', 'resume')
        self.assert_changed(server)
        self.action(server, 'SHUTOFF', 'os-stop')
        stopped = self.image_of(server)
        self.assertEqual('stopped', self.info(server)['state'])
        before, after = self.members(paused), self.members(stopped)
        # For a moment, CRIU's dump has a mount point of its own there.
        for members in (before, after):
            for changed in ('mtime', 'chksum'):
                del members['./tmp'][changed]
        self.assertEqual({}, {
            name: (before.get(name), after.get(name))
            for name in before | after
            if before.get(name) != after.get(name)})

    def test_task_states(self):
        seen = []
        server = self.boot()
        self.store.uploading = lambda image_id: seen.append((
            self.api.get_server(server['id'])['OS-EXT-STS:task_state'],
            self.glance.images[image_id]['status']))
        self.image_of(server)
        self.assertEqual([('image_uploading', 'saving')], seen)

    def test_progress(self):
        server = self.boot()
        self.sh(server, 'dd if=/dev/urandom of=/big bs=1M count=64')
        self.patch(snapshot, '_LOOK_S', 0.0)
        seen, pieces = [], itertools.count()

        def progress():
            return self.api.get_server(server['id'])['progress']

        def took(image_id):
            # The API answers slower than a piece comes.
            if next(pieces) % 50 == 0:
                seen.append(progress())

        self.store.took = took
        self.image_of(server)
        print(seen)
        self.assertEqual(sorted(seen), seen)
        self.assertEqual(0, seen[0])
        # There are those between, and the guess was a good one.
        self.assertGreater(len({*seen}), 10)
        self.assertGreater(seen[-1], 80)
        self.assertEqual(0, progress())
        # Also when it fails.
        self.store.took = lambda image_id: (
            next(pieces) % 50 == 0 and progress() > 50 and
            self.glance.delete(None, image_id))
        self.api.post_server_action(
            server['id'], {'createImage': {'name': 'snap'}})
        self.wait_for(
            lambda: not self.api.get_server(server['id'])[
                'OS-EXT-STS:task_state'], 'the end')
        self.assertEqual([], self.snapshots()[1:])
        self.assertEqual(0, progress())

    def test_shelve_and_unshelve(self):
        self.flags(shelved_offload_time=-1)
        server = self.boot()
        self.change(server)
        self.action(server, 'SHELVED', 'shelve')
        self.assertEqual('stopped', self.info(server)['state'])
        self.action(server, 'ACTIVE', 'unshelve')
        self.assert_changed(server)
        self.action(server, 'SHELVED', 'shelve')
        self.action(server, 'SHELVED_OFFLOADED', 'shelveOffload')
        self.assert_nothing_left()
        self.action(server, 'ACTIVE', 'unshelve', {'host': 'host2'})
        self.assert_changed(server, 'host2')
        # What was only for that is gone.
        self.assertEqual([], [
            image for image in self.glance.images.values()
            if 'shelved' in image['name']])
        self.delete(server)
        self.assert_nothing_left('host2')

    def test_backups_rotate(self):
        server = self.boot()
        for number in range(3):
            self.sh(server, f'echo {number} > /number')
            self.api.post_server_action(server['id'], {'createBackup': {
                'name': f'backup-{number}', 'backup_type': 'daily',
                'rotation': 2}})
            self.wait_for(
                lambda name=f'backup-{number}': self.done(server, name),
                'the backup')
        kept = {image['name']: image['id']
                for image in self.glance.images.values()
                if image['name'].startswith('backup')}
        self.assertEqual({'backup-1', 'backup-2'}, {*kept})
        with tarfile.open(fileobj=io.BytesIO(
                self.store.data(kept['backup-1']))) as archive:
            self.assertEqual(
                b'1\n', archive.extractfile('./number').read())

    def done(self, server, name):
        """Whether an image of this name is complete, and the server free."""
        return 'active' in [
            image['status'] for image in self.glance.images.values()
            if image['name'] == name] and not self.api.get_server(
                server['id'])['OS-EXT-STS:task_state']

    def test_rebuild(self):
        server = self.boot()
        self.change(server)
        image_id = self.image_of(server)
        self.sh(server, 'touch /later')
        base_id = self.info(server)['base_id']
        # Back to the snapshot, and to the image that it came from.
        self.action(server, 'ACTIVE', 'rebuild', {'imageRef': image_id})
        self.assert_changed(server)
        self.assertEqual('', self.sh(server, 'ls /later || true'))
        self.assertEqual(base_id, self.info(server)['base_id'])
        self.action(server, 'ACTIVE', 'rebuild', {'imageRef': self.image})
        self.assertEqual('', self.sh(server, 'ls -d /data || true'))
        self.api.post_server_action(server['id'], {'rebuild': {
            'imageRef': self.image, 'preserve_ephemeral': True}},
            check_response_status=[202])
        server = self.wait(server, 'ERROR')
        self.assertIn('preserving ephemeral', server['fault']['message'])

    # What goes wrong

    def test_image_deleted_in_the_middle(self):
        server = self.boot()
        # More than the pipes and sockets in between hold.
        self.sh(server, 'dd if=/dev/urandom of=/big bs=1M count=32')
        for look in (0.0, 3600.0):
            # Noticed while it is read, and only when that has failed.
            self.patch(snapshot, '_LOOK_S', look)
            self.store.uploading = lambda image_id: self.glance.delete(
                None, image_id)
            self.api.post_server_action(
                server['id'], {'createImage': {'name': 'snap'}})
            self.wait_for(
                lambda: not self.api.get_server(server['id'])[
                    'OS-EXT-STS:task_state'], 'the end')
            self.assertEqual([], self.snapshots())
        self.assertEqual('ACTIVE', self.api.get_server(
            server['id'])['status'])

    def test_server_deleted_in_the_middle(self):
        server = self.boot()
        self.sh(server, 'dd if=/dev/urandom of=/big bs=1M count=32')
        self.store.uploading = lambda image_id: self.api.delete_server(
            server['id'])
        self.api.post_server_action(
            server['id'], {'createImage': {'name': 'snap'}})
        self._wait_until_deleted(server)
        self.wait_for(lambda: not self.snapshots(), 'the removal')
        self.wait_for(
            lambda: not self.agents.leftovers('host1'), 'the clean-up')
        self.assert_nothing_left()

    def test_agent_lost_in_the_middle(self):
        server = self.boot()
        self.sh(server, 'dd if=/dev/urandom of=/big bs=1M count=32')
        self.store.uploading = lambda image_id: self.agents.stop('host1')
        self.api.post_server_action(
            server['id'], {'createImage': {'name': 'snap'}})
        self.wait_for(lambda: not self.snapshots(), 'the removal')
        self.agents.start('host1')
        self.wait_for(
            lambda: not self.api.get_server(server['id'])[
                'OS-EXT-STS:task_state'], 'the end')
        self.assertEqual('ACTIVE', self.api.get_server(
            server['id'])['status'])
        self.store.uploading = None
        self.image_of(server)

    def snapshots(self):
        return [image for image in self.glance.images.values()
                if image['name'] == 'snap']

    def patch(self, module, name, value):
        self.addCleanup(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
