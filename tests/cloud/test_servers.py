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

"""A server's first life: what a user sees who makes one."""

from tests.cloud import base


class ServerTest(base.CloudTestCase):

    def test_debian(self):
        server = self.create_server('debian13', name='first-server')
        self.assertIn(self.host_of(server), base.HOSTS)
        address = self.floating_ip(server)
        self.wait_ssh(address, user='debian')
        self.assertEqual('first-server', self.ssh(
            address, 'hostname', user='debian').strip())
        self.assertEqual('systemd', self.ssh(
            address, 'cat /proc/1/comm', user='debian').strip())
        self.assertIn(self.fixed_ip(server), self.ssh(
            address, 'ip -4 -brief address', user='debian'))
        self.assertIn(server.id, self.ssh(
            address, 'curl -s http://169.254.169.254/openstack/latest/'
            'meta_data.json', user='debian'))
        base.wait_for(lambda: 'login:' in self.console(server), 60,
                      'the console shows a login')

    def test_chosen_host(self):
        for host in base.HOSTS:
            server = self.create_server('busybox', 'pyc.tiny', host=host)
            self.assertEqual(host, self.host_of(server))

    def test_across_hosts(self):
        servers = [self.create_server('debian13', host=host, name=host)
                   for host in base.HOSTS]
        addresses = [self.floating_ip(server) for server in servers]
        for address in addresses:
            self.wait_ssh(address, user='debian')
        self.ssh(addresses[0],
                 f'sudo ping -c 3 -i 0.3 {self.fixed_ip(servers[1])}',
                 user='debian')
        # Bulk data: with unfinished checksums or a wrong MTU pings pass and
        # TCP stops.
        size = 3_000_000
        for address in addresses:
            text = self.ssh(address, f'head -c {size} /dev/zero | tr "\\0" x',
                            user='debian')
            self.assertEqual(size, len(text))
