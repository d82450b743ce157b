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
"""Files and addresses that are in a server's root when it starts."""

import base64

from tests.functional import agents
from tests.functional import base

#: The last one with "personality".
_VERSION = '2.56'


class InjectionTest(base.TestCase):

    def boot_with(self, files, *, status='ACTIVE', **values):
        with self.old_api():
            server = self.boot(
                host=None, availability_zone='nova:host1', wait=False,
                personality=_personality(files), **values)
        return self.wait(server, status)

    def old_api(self):
        return base.microversion(self.api, _VERSION)

    def assert_given(self, server, files, modes='644 0 0'):
        client = self.agents.client('host1')
        if agents.Agents is not agents.Real:
            spec = client.containers[server['id']]['spec']
            self.assertLessEqual(files.items(), {
                item['path']: base64.b64decode(item['content'])
                for item in spec['files']}.items())
            return
        for path, content in files.items():
            done = client.exec(server['id'], [
                '/bin/sh', '-c', f'cat {path}; stat -c "%a %u %g" {path} >&2'])
            self.assertEqual((content, modes), (
                done['stdout'], done['stderr'].decode().strip()), path)

    def test_files(self):
        files = {'/etc/motd': b'hello\n', '/srv/new/data': b'\0\xff'}
        server = self.boot_with(files)
        self.assert_given(server, files)
        # A rebuilt one has those of the rebuilding, and no others.
        other = {'/root/file': b'other'}
        with self.old_api():
            self.api.post_server_action(server['id'], {'rebuild': {
                'imageRef': self.image, 'personality': _personality(other)}})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'rebuild')
        self.assert_given(server, other)
        if agents.Agents is agents.Real:
            done = self.agents.client('host1').exec(
                server['id'], ['/bin/sh', '-c', 'ls /srv'])
            self.assertEqual(b'', done['stdout'])
        self.delete(server)
        self.assert_nothing_left()

    def test_first_version_of_the_api(self):
        """As many as the quota allows, and a path without a root."""
        files = {f'/test{i}.txt': b'This is a test file.%d' % i
                 for i in range(5)}
        port = [{'port': self.neutron.port_1['id']}]
        with base.microversion(self.api, '2.1'):
            server = self.boot(
                host=None, availability_zone='nova:host1', wait=False,
                networks=port, personality=_personality(files))
        server = self.wait(server, 'ACTIVE')
        self.assert_given(server, files)
        with base.microversion(self.api, '2.1'):
            self.api.post_server_action(server['id'], {'rebuild': {
                'imageRef': self.image, 'personality': _personality(
                    {'rebuild.txt': b'Test server rebuild.'})}})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'rebuild')
        if agents.Agents is agents.Real:
            self.assert_given(
                server, {'/rebuild.txt': b'Test server rebuild.'})

    def test_path_that_cannot_be(self):
        if agents.Agents is not agents.Real:
            self.skipTest('files need root; run tools/run_tests.sh')
        server = self.boot_with({'/etc/passwd/file': b''}, status='ERROR')
        message = server['fault']['message']
        self.assertIn("'/etc/passwd/file' cannot be written", message)
        self.assertIn('Choose another path', message)
        self.assert_nothing_left()

    def test_config_drive_has_them(self):
        server = self.boot_with({'/etc/new': b'hello'}, config_drive=True)
        client = self.agents.client('host1')
        if agents.Agents is agents.Real:
            done = client.exec(server['id'], [
                '/bin/sh', '-c', 'cat /config-drive/openstack/content/0000; '
                'test -e /etc/new || echo " and not in the root"'])
            self.assertEqual(
                b'hello and not in the root\n', done['stdout'])
        else:
            spec = client.containers[server['id']]['spec']
            self.assertEqual([], spec['files'])
            self.assertIn(
                'openstack/content/0000', spec['config_drive'])

    def test_addresses(self):
        self.flags(flat_injected=True)
        server = self.boot(networks=[{'port': self.neutron.port_1['id']}])
        content = self.interfaces(server)
        self.assertIn('iface eth0 inet static', content)
        self.assertIn('address 192.168.1.3\n', content)
        self.assertIn('netmask 255.255.255.0\n', content)
        self.assertIn('gateway 192.168.1.1\n', content)
        self.assertIn(self.info(server)['nics'][0]['mac'], content)

    def interfaces(self, server):
        client = self.agents.client('host1')
        if agents.Agents is not agents.Real:
            item, = client.containers[server['id']]['spec']['files']
            return base64.b64decode(item['content']).decode()
        return client.exec(server['id'], [
            'cat', '/etc/network/interfaces'])['stdout'].decode()

    def test_addresses_that_a_guest_uses(self):
        """Debian's ifupdown, with no DHCP server anywhere."""
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        self.flags(flat_injected=True)
        image = self.make_image(agents.image('sysvinit'))
        self.flavor = self._create_flavor(
            memory_mb=512, vcpu=1, disk=3, ephemeral=0)
        server = self.boot(
            image=image, networks=[{'port': self.neutron.port_1['id']}])
        client = self.agents.client('host1')

        def configured():
            # ifupdown adds the route some time after the address.
            said = client.exec(server['id'], [
                '/bin/sh', '-c', 'ip -brief -4 address show eth0; '
                'ip route show default'])['stdout']
            return b'192.168.1.3/24' in said and b'via 192.168.1.1' in said

        self.wait_for(configured, 'the address and the route', seconds=120)


def _personality(files):
    return [{'path': path, 'contents': base64.b64encode(content).decode()}
            for path, content in files.items()]
