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
"""What a user finds in a server, and that its limits hold."""

import json
import pathlib
import subprocess
import tempfile
import uuid

from tests.cloud import base

_GIB = 1 << 30
_MEMORY_MIB = 256
_PIDS = 300
_TOKEN = uuid.uuid4().hex

_CLOUD_CONFIG = f'''#cloud-config
write_files:
  - path: /var/lib/token
    content: {_TOKEN}
'''
_SCRIPT = f'''#!/bin/sh
echo -n {_TOKEN} >/var/lib/token
'''

#: Takes more and more memory, and says how much.
_HOG = '''python3 -c '
taken = []
while True:
    taken.append(bytearray(8 << 20))
    print(len(taken) * 8, flush=True)
' '''


class GuestTest(base.CloudTestCase):
    """Two servers of one user on one host.

    One gets its data from the metadata service and is then treated badly;
    the other, with a config drive, is its neighbour.
    """

    def setUp(self):
        super().setUp()
        (self.guest, self.address, self.neighbour,
         self.neighbour_address) = self.kept('servers', self._servers)

    def _servers(self):
        flavor = self.flavor('ct-limits', _MEMORY_MIB, 1,
                             pycontainer__pids_max=str(_PIDS))
        group = self.cli('server', 'group', 'create', '--policy', 'affinity',
                         '-f', 'value', '-c', 'id', 'ct-group').strip()
        self.addCleanup(self.cli, 'server', 'group', 'delete', group)
        made = []
        for name, data, options in (
                ('ct-guest', _CLOUD_CONFIG, ()),
                ('ct-neighbour', _SCRIPT, ('--config-drive', 'true'))):
            with tempfile.NamedTemporaryFile('w') as file:
                file.write(data)
                file.flush()
                made.append(self.boot(
                    name, '--hint', f'group={group}', '--user-data',
                    file.name, *options, flavor=flavor, wait=False))
        found = []
        for server in made:
            self.wait_server(server.id, 'ACTIVE')
            found += [server, self.floating_ip(server)]
        for address in found[1::2]:
            self.wait_ssh(address, user='debian')
            self.ssh(address, 'cloud-init status --wait', user='debian')
        self.assertEqual(*(self.host_of(server) for server in made))
        return found

    def _in(self, command, timeout=60):
        return self.ssh(self.address, command, 'debian', timeout)

    def _in_neighbour(self, command):
        return self.ssh(self.neighbour_address, command, 'debian')

    def _start_of_init(self, address):
        """Changes if a server was started again."""
        return self.ssh(address, 'cut -d" " -f22 /proc/1/stat', 'debian')

    def _assert_neighbour_is_well(self):
        self._in_neighbour('dd if=/dev/zero of=/var/tmp/probe bs=1M count=20 '
                           'conv=fsync status=none && rm /var/tmp/probe')
        self.assertIn('root', self._in_neighbour('sudo id -un'))
        self.assertEqual(0, self.container(self.neighbour)['oom_kills'])

    def _datasource(self, address):
        text = self.ssh(address, 'cat /run/cloud-init/result.json', 'debian')
        result = json.loads(text)['v1']
        self.assertEqual([], result['errors'])
        return result['datasource']

    def _assert_user_data_and_key(self, address):
        # The key is proved by the login; cloud-init alone may have put it
        # there, as the image has no user of that name.
        key = pathlib.Path(f'{base.DEMO_KEY}.pub').read_text().split()[1]
        self.assertIn(key, self.ssh(
            address, 'cat ~/.ssh/authorized_keys', 'debian'))
        self.assertEqual(_TOKEN, self.ssh(
            address, 'cat /var/lib/token', 'debian'))

    def test_metadata_service(self):
        self.assertIn('DataSourceOpenStack', self._datasource(self.address))
        self.assertIn('http://169.254.169.254',
                      self._in('cloud-init query subplatform'))
        self._assert_user_data_and_key(self.address)
        # It had nothing else to take them from.
        self.assertRaises(base.CommandError, self._in,
                          'sudo ls /config-drive')

    def test_config_drive(self):
        self.assertIn('DataSourceConfigDrive',
                      self._datasource(self.neighbour_address))
        self._assert_user_data_and_key(self.neighbour_address)
        meta = json.loads(self._in_neighbour(
            'sudo cat /config-drive/openstack/latest/meta_data.json'))
        self.assertEqual(self.neighbour.id, meta['uuid'])
        self.assertIn('Read-only', self.assertRaises(
            base.CommandError, self._in_neighbour,
            'sudo touch /config-drive/x').args[0])
        self.assertTrue(json.loads(self.cli(
            'server', 'show', self.neighbour.id, '-f', 'json')
        )['config_drive'])

    def test_hostname(self):
        for address, name in ((self.address, 'ct-guest'),
                              (self.neighbour_address, 'ct-neighbour')):
            self.assertEqual(name, self.ssh(
                address, 'hostname', 'debian').strip())
            self.assertIn(name, self.ssh(
                address, 'getent hosts $(hostname)', 'debian'))

    def test_address(self):
        addresses = json.loads(self._in('ip -j -4 address show eth0'))
        self.assertEqual(
            [self.fixed_ip(self.guest)],
            [info['local'] for info in addresses[0]['addr_info']])
        mac = next(self.demo.network.ports(
            device_id=self.guest.id)).mac_address
        self.assertEqual(mac, addresses[0].get('address') or self._in(
            'cat /sys/class/net/eth0/address').strip())

    def test_disk_is_the_flavors(self):
        size = int(self._in('df -B1 --output=size / | tail -n1'))
        self.assertTrue(0.9 * _GIB < size <= _GIB, size)

    def test_full_disk(self):
        before = self._start_of_init(self.address)
        error = self.assertRaises(
            base.CommandError, self._in,
            'sudo dd if=/dev/zero of=/fill bs=1M', 120)
        self.assertIn('No space left on device', str(error))
        try:
            # Nearly all of its gigabyte, and no byte more.
            size = int(self._in('stat -c %s /fill'))
            self.assertTrue(_GIB / 2 < size <= _GIB, size)
            # What is left is less than a block of dd's.
            self.assertLessEqual(int(self._in(
                'df -B1M --output=avail / | tail -n1')), 1)
            self._assert_neighbour_is_well()
        finally:
            self._in('sudo rm /fill')
        self._in('sudo dd if=/dev/zero of=/fill bs=1M count=50 conv=fsync '
                 '&& sudo rm /fill')
        self.assertEqual(before, self._start_of_init(self.address))

    def test_memory_hog(self):
        before = self._start_of_init(self.address)
        killed = self.container(self.guest)['oom_kills']
        neighbour = self._start_of_init(self.neighbour_address)
        hog = subprocess.Popen(
            [*base.SSH, f'debian@{self.address}', _HOG],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(hog.stdout.close)
        self.addCleanup(hog.stderr.close)
        self.addCleanup(hog.kill)
        self._assert_neighbour_is_well()
        out, err = hog.communicate(timeout=120)
        self.assertNotEqual(0, hog.returncode, err)
        taken = int(out.split()[-1])
        self.assertTrue(_MEMORY_MIB / 4 < taken <= _MEMORY_MIB, taken)
        self.assertGreater(self.container(self.guest)['oom_kills'], killed)
        self.wait_ssh(self.address, 'debian')
        self.assertEqual(before, self._start_of_init(self.address))
        self._assert_neighbour_is_well()
        self.assertEqual(neighbour,
                         self._start_of_init(self.neighbour_address))
        self.assertEqual('ACTIVE', self.demo.compute.get_server(
            self.guest.id).status)

    def test_process_bomb(self):
        neighbour = self._start_of_init(self.neighbour_address)
        self._in('''sudo systemd-run --quiet --property=TasksMax=infinity \
            /bin/bash -c 'b() { b | b & }; b; sleep 1000' ''')
        base.wait_for(
            lambda: self.container(self.guest)['pids'] > 0.9 * _PIDS, 60,
            'the guest has as many processes as it may')
        # Another shell than bash, which would try for half a minute.
        self.assertIn('Cannot fork', self.assertRaises(
            base.CommandError, self.inside, self.guest,
            'i=0; while [ $i -lt 400 ]; do sleep 5 & i=$((i + 1)); done'
        ).args[0])
        for _ in range(3):
            self._assert_neighbour_is_well()
        self.assertLessEqual(self.container(self.guest)['pids'], _PIDS)
        self.assertEqual(neighbour,
                         self._start_of_init(self.neighbour_address))
        self.assertEqual('ACTIVE', self.demo.compute.get_server(
            self.guest.id).status)
        # And a way out of it for its user.
        self.cli('server', 'reboot', '--hard', '--wait', self.guest.id)
        self.wait_ssh(self.address, 'debian')
        self.assertLess(self.container(self.guest)['pids'], _PIDS / 2)
