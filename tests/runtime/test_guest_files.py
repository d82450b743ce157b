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
"""Files that a container has from its first moment on."""

import base64
import os
import uuid as uuidlib

from tests.runtime import base


def files(*paths, content=b'given'):
    return [{'path': path, 'content': base64.b64encode(content).decode()}
            for path in paths]


class GuestFilesTestCase(base.HostTestCase):

    def test_files(self):
        # A new one, one in new directories, one of the image's.
        uuid = self.run_container(files=files(
            '/etc/new', '/srv/a/b/new', '/etc/passwd', '/var/../root/new'))
        for name in ('/etc/new', '/srv/a/b/new', '/etc/passwd', '/root/new'):
            self.assertEqual('given', self.sh(uuid, f'cat {name}'))
            self.assertEqual('644 0 0', self.sh(
                uuid, f'stat -c "%a %u %g" {name}'))
        for name in ('/srv/a', '/srv/a/b'):
            self.assertEqual('755 0 0', self.sh(
                uuid, f'stat -c "%a %u %g" {name}'))
        # They are the guest's to change, and are not written again.
        self.sh(uuid, 'echo changed > /etc/new; rm -r /srv/a')
        self.host.kill(uuid)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        self.assertEqual('changed', self.sh(uuid, 'cat /etc/new'))
        self.assertEqual('', self.sh(uuid, 'ls /srv'))
        self.assertNotIn('files', self.host.info(uuid)['spec'])
        # The layer is as it was, for others.
        other = self.run_container()
        self.assertIn('root:', self.sh(other, 'cat /etc/passwd'))

    def test_nothing_is_mounted_until_it_starts(self):
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec(files=files('/etc/new')))
        with open('/proc/self/mountinfo') as f:
            self.assertNotIn(uuid, f.read())
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))

    def test_refusals_leave_nothing(self):
        for code, given in (
                ('file_refused', files('/etc/new', '/etc/passwd/new')),
                ('no_space', files('/new', content=os.urandom(40 << 20)))):
            uuid = str(uuidlib.uuid4())
            error = self.assert_code(
                code, self.host.define, uuid,
                self.spec(disk=32 * base.MIB, files=given))
            self.assertIn('new', str(error))
            self.assertEqual([], self.traces(uuid))
            self.assertEqual([], self.host.list())

    def test_agent_that_is_killed(self):
        """As far as its successor is concerned: the mounts are there."""
        uuid = str(uuidlib.uuid4())

        self.host.define(uuid, self.spec())
        item = self.host.entry(uuid).container
        item.disk.mount()
        item._show_root(self.host.layer_root(item))
        self.host.close()
        self.host = self.make_host()
        with open('/proc/self/mountinfo') as f:
            self.assertNotIn(uuid, f.read())
        self.assertEqual('defined', self.state(uuid))
        self.host.delete(uuid)
        self.assertEqual([], self.traces(uuid))
