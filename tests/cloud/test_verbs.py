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

"""Verbs of a server, as users type them."""

import json

import websocket

from tests.cloud import base

#: Ends what hangs; nothing is measured by it.
PATIENCE = 120.0

_WITH_PASSWORD = """#cloud-config
password: a pass phrase
chpasswd: {expire: false}
runcmd:
- echo the password is set > /dev/console
"""


class VerbsTest(base.CloudTestCase):

    def setUp(self):
        super().setUp()
        self.server, self.address = self.kept('server', self._server)

    def _server(self):
        server = self.create_server('debian13', name='verbs')
        address = self.floating_ip(server)
        self.wait_ssh(address, user='debian')
        return server, address

    def ssh_in(self, command):
        return self.ssh(self.address, command, user='debian')

    def wait(self, status):
        self.wait_server(self.server.id, status)

    def settle(self):
        """Leave the server for other tests, also after a failed resize."""
        if self.demo.compute.get_server(
                self.server.id).status == 'VERIFY_RESIZE':
            self.cli('server', 'resize', 'revert', self.server.id)
            self.wait('ACTIVE')

    def test_suspend(self):
        pid = self.ssh_in('sudo sh -c "sleep 86421 >&- 2>&- <&- & echo \\$!"')
        self.ssh_in('echo in memory > /dev/shm/file')
        self.cli('server', 'suspend', self.server.id)
        self.wait('SUSPENDED')
        self.assertEqual('suspended', self.container(self.server)['state'])
        self.cli('server', 'resume', self.server.id)
        self.wait('ACTIVE')
        self.wait_ssh(self.address, user='debian')
        self.assertIn('sleep', self.ssh_in(f'ps -o comm= -p {pid.strip()}'))
        self.assertEqual('in memory', self.ssh_in('cat /dev/shm/file').strip())
        self.assertEqual('running', self.ssh_in(
            'systemctl is-system-running').strip())

    def test_interface(self):
        """A second port, with an address by DHCP, and a move with it."""
        network = self.demo.network.find_network('private')
        port = self.demo.network.create_port(network_id=network.id)
        self.addCleanup(self.demo.network.delete_port, port)
        address = port.fixed_ips[0]['ip_address']
        self.cli('server', 'add', 'port', self.server.id, port.id)
        self.wait('ACTIVE')
        self.ssh_in(
            "printf '[Match]\\nName=eth1\\n[Network]\\nDHCP=ipv4\\n"
            "[DHCPv4]\\nRouteMetric=2000\\n' | "
            'sudo tee /etc/systemd/network/80-eth1.network; '
            'sudo networkctl reload; sudo ip link set eth1 up')

        def addressed():
            return address in self.ssh_in('ip -4 -brief address show eth1')

        base.wait_for(addressed, PATIENCE, 'the address')
        self.assertEqual('ACTIVE', self.demo.network.get_port(port).status)
        here = self.host_of(self.server)
        self.cli('server', 'migrate', '--live-migration', '--wait',
                 self.server.id, user='admin')
        self.assertNotEqual(here, self.host_of(self.server))
        self.assertTrue(addressed())
        gateway = self.demo.network.get_subnet(
            port.fixed_ips[0]['subnet_id']).gateway_ip
        self.ssh_in(f'sudo ping -c 2 -I eth1 {gateway}')
        self.cli('server', 'remove', 'port', self.server.id, port.id)
        base.wait_for(lambda: 'eth1' not in self.ssh_in('ls /sys/class/net'),
                      PATIENCE, 'the end of the interface')
        self.assertEqual(1, len(self.container(self.server)['nics']))
        # It moves without it, too.
        here = self.host_of(self.server)
        self.cli('server', 'migrate', '--live-migration', '--wait',
                 self.server.id, user='admin')
        self.assertNotEqual(here, self.host_of(self.server))

    def test_tags(self):
        network = self.demo.network.find_network('private')
        small = self.create_server('busybox', 'pyc.tiny', networks=[
            {'uuid': network.id, 'tag': 'first'}])

        def devices(read):
            document = json.loads(read(
                'http://169.254.169.254/openstack/latest/meta_data.json'))
            return {(device['mac'], *device['tags'])
                    for device in document['devices'] if device.get('tags')}

        def of_small(url):
            return self.on_host(
                self.host_of(small), 'pycontainer', 'exec', small.id, '--',
                'wget', '-q', '-O', '-', url)

        # Its address may take a moment.
        base.wait_for(
            lambda: 'default' in self.on_host(
                self.host_of(small), 'pycontainer', 'exec', small.id, '--',
                'ip', 'route'), PATIENCE, 'the address')
        [nic] = self.container(small)['nics']
        self.assertEqual({(nic['mac'], 'first')}, devices(of_small))
        port = self.demo.network.create_port(network_id=network.id)
        self.addCleanup(self.demo.network.delete_port, port)
        self.cli('--os-compute-api-version', '2.49', 'server', 'add', 'port',
                 '--tag', 'second', self.server.id, port.id)

        # Nova keeps what it has told a guest for some seconds.
        base.wait_for(
            lambda: (port.mac_address, 'second') in devices(
                lambda url: self.ssh_in(f'curl -s {url}')),
            PATIENCE, 'the tag')
        self.cli('server', 'remove', 'port', self.server.id, port.id)
        base.wait_for(
            lambda: len(self.container(self.server)['nics']) == 1,
            PATIENCE, 'the end of the interface')

    def test_resize(self):
        self.ssh_in('echo mine > kept; sync')
        here = self.host_of(self.server)
        memory = self.container(self.server)['resources']['memory_bytes']
        disk = self.ssh_in('df --output=size / | tail -n 1')
        large = self.flavor('ct-larger', (memory >> 20) + 64, 6)
        self.addCleanup(self.settle)
        self.cli('server', 'resize', '--flavor', large, '--wait',
                 self.server.id)
        self.wait('VERIFY_RESIZE')
        self.wait_ssh(self.address, user='debian')
        self.assertEqual('mine', self.ssh_in('cat kept').strip())
        self.assertNotEqual(here, self.host_of(self.server))
        self.assertEqual(memory + (64 << 20), self.container(
            self.server)['resources']['memory_bytes'])
        self.assertGreater(
            int(self.ssh_in('df --output=size / | tail -n 1')), int(disk))
        self.cli('server', 'resize', 'revert', self.server.id)
        self.wait('ACTIVE')
        self.assertEqual(here, self.host_of(self.server))
        self.wait_ssh(self.address, user='debian')
        self.assertEqual(memory, self.container(
            self.server)['resources']['memory_bytes'])
        self.assertEqual(disk, self.ssh_in('df --output=size / | tail -n 1'))

    def test_cold_migration(self):
        self.ssh_in('echo mine > kept; sync')
        here = self.host_of(self.server)
        self.addCleanup(self.settle)
        self.cli('server', 'migrate', '--wait', self.server.id, user='admin')
        self.wait('VERIFY_RESIZE')
        self.cli('server', 'migrate', 'confirm', self.server.id,
                 user='admin')
        self.wait('ACTIVE')
        there = self.host_of(self.server)
        self.assertNotEqual(here, there)
        self.wait_ssh(self.address, user='debian')
        self.assertEqual('mine', self.ssh_in('cat kept').strip())
        base.wait_for(
            lambda: self.server.id not in self.containers(here), PATIENCE,
            'the end of the copy at the source')
        # And what it can do afterwards.
        self.cli('server', 'migrate', '--live-migration', '--wait',
                 self.server.id, user='admin')
        self.assertEqual(here, self.host_of(self.server))
        self.assertEqual('mine', self.ssh_in('cat kept').strip())

    def test_admin_password(self):
        before = self.ssh_in('sudo grep ^root: /etc/shadow')
        self.demo.compute.change_server_password(
            self.server.id, 'a secret: with a colon')
        base.wait_for(
            lambda: self.ssh_in('sudo grep ^root: /etc/shadow') != before,
            PATIENCE, 'the password')
        self.assertIn('root:$', self.ssh_in('sudo grep ^root: /etc/shadow'))
        # CVE-2015-8749: whoever reads logs does not learn it from ours.
        for service in ('agent', 'nova-compute'):
            logs = [*base.LOGS.glob(f'host*.{service}.log')]
            self.assertEqual(len(base.HOSTS), len(logs))
            for log in logs:
                self.assertNotIn(b'a secret: with', log.read_bytes())

    def test_password_of_the_guests_own(self):
        """What cloudbase-init gives to the metadata service."""
        self.ssh_in('curl -sf --data-binary c2VjcmV0 '
                    'http://169.254.169.254/openstack/latest/password')
        found = self.demo.compute.get(
            f'/servers/{self.server.id}/os-server-password').json()
        self.assertEqual('c2VjcmV0', found['password'])

    def test_diagnostics(self):
        figures = json.loads(self.cli(
            '--os-compute-api-version', '2.48', 'server', 'show',
            '--diagnostics', self.server.id, '-f', 'json', user='admin'))
        self.assertEqual('running', figures['state'])
        self.assertEqual('pycontainer', figures['hypervisor'])
        self.assertGreater(figures['cpu_details'][0]['time'], 0)
        self.assertGreater(figures['nic_details'][0]['rx_octets'], 0)


class SerialConsoleTest(base.CloudTestCase):
    """Through nova-serialproxy, by a WebSocket client that logs in."""

    def _console(self, server):
        url = self.cli('console', 'url', 'show', '--serial', server.id,
                       '-f', 'value', '-c', 'url').strip()
        client = websocket.create_connection(
            url, timeout=PATIENCE, subprotocols=['binary'],
            http_no_proxy=['*'])
        self.addCleanup(client.close)
        return client

    def _read_until(self, client, text):
        output = ''
        while text not in output:
            output += client.recv().decode(errors='replace')
        return output

    def test_login(self):
        server = self.create_server(
            'debian13', name='console', user_data=_WITH_PASSWORD)
        base.wait_for(lambda: 'login:' in self.console(server), PATIENCE,
                      'the login')
        base.wait_for(lambda: 'password is set' in self.console(server),
                      PATIENCE, 'cloud-init')
        client = self._console(server)
        client.send_binary(b'\n')
        self._read_until(client, 'login:')
        client.send_binary(b'debian\n')
        self._read_until(client, 'assword:')
        client.send_binary(b'a pass phrase\n')
        self._read_until(client, '$')
        client.send_binary(b'echo log"ge"d in as $USER\n')
        self._read_until(client, 'logged in as debian')
        # What was seen is in the log, too.
        self.assertIn('logged in as debian', self.console(server))
        # It goes where the server goes.
        self.cli('server', 'migrate', '--live-migration', '--wait',
                 server.id, user='admin')
        moved = self._console(server)
        moved.send_binary(b'echo sti"ll" $USER\n')
        self._read_until(moved, 'still debian')

    def test_of_a_stopped_server(self):
        server = self.create_server('busybox', 'pyc.tiny')
        self.demo.compute.stop_server(server.id)
        self.wait_server(server.id, 'SHUTOFF')
        error = self.assertRaises(
            base.CommandError, self.cli, 'console', 'url', 'show',
            '--serial', server.id)
        self.assertIn('409', str(error))
