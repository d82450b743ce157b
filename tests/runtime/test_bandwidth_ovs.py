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

"""Limits of interfaces and a real Open vSwitch, which is not theirs to tell.

It removes queueing disciplines of its ports. Its userspace datapath, which is
the harder one, needs no module of the kernel.
"""

import pathlib
import shutil
import subprocess

from tests.runtime import base
from tests import speed

_SLOW, _FASTER = 500_000, 2_000_000
_SCHEMA = pathlib.Path('/usr/share/openvswitch/vswitch.ovsschema')


class OpenVSwitchTestCase(base.HostTestCase):

    def setUp(self):
        super().setUp()
        if not shutil.which('ovs-vswitchd') or not _SCHEMA.exists():
            self.skipTest('there is no Open vSwitch; tools/lib/packages.sh '
                          'installs it')
        self.top = self.config.run_dir / 'ovs'
        self.top.mkdir()
        self.environment = {
            'PATH': '/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin',
            'OVS_RUNDIR': str(self.top), 'OVS_LOGDIR': str(self.top),
            'OVS_DBDIR': str(self.top)}
        database, self.socket = self.top / 'conf.db', self.top / 'db.sock'
        self.run_program('ovsdb-tool', 'create', database, _SCHEMA)
        self.start('ovsdb-server', database, f'--remote=punix:{self.socket}')
        base.wait_for(self.socket.exists, 'the database')
        self.start('ovs-vswitchd', f'unix:{self.socket}')
        self.vsctl('add-br', 'br0', '--', 'set', 'bridge', 'br0',
                   'datapath_type=netdev')
        self.addCleanup(self.vsctl, 'del-br', 'br0')

    def start(self, *argv):
        with open(self.top / f'{argv[0]}.log', 'ab') as log:
            started = subprocess.Popen(
                [*map(str, argv)], env=self.environment, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL)
        self.addCleanup(started.wait, base.PATIENCE)
        self.addCleanup(started.terminate)

    def run_program(self, *argv):
        subprocess.run([*map(str, argv)], env=self.environment, check=True,
                       timeout=base.PATIENCE, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL)

    def vsctl(self, *argv):
        """Returns when the switch has done it."""
        self.run_program('ovs-vsctl', f'--db=unix:{self.socket}', *argv)

    def disciplines(self, name):
        return subprocess.run(
            ['tc', 'qdisc', 'show', 'dev', name], check=True, text=True,
            stdout=subprocess.PIPE, timeout=30).stdout

    def assert_limited(self, uuid):
        found = speed.of('203.0.113.1', lambda script: self.sh(uuid, script))
        print(*(f'{value / 1000:.0f} kB/s' for value in found))
        for value, limit in zip(found, (_SLOW, _FASTER), strict=True):
            self.assertTrue(limit / 2 < value < limit * 1.5, found)

    def test_nothing_that_it_does_to_its_port(self):
        ident = '0123456789f'
        devname = f'tap{ident}'
        uuid = self.run_container(nics=[{
            'id': f'{ident}-x', 'devname': devname,
            'mac': 'fa:16:3e:00:00:21', 'mtu': 1450, 'tx_offload': False,
            'inbound': {'average': _SLOW}, 'outbound': {'average': _FASTER}}])
        for argv in (['address', 'add', '203.0.113.1/24', 'dev', 'br0'],
                     ['link', 'set', 'br0', 'mtu', '1450', 'up']):
            subprocess.run(['ip', *argv], check=True, timeout=30)
        # This is what the port would lose.
        subprocess.run(
            ['tc', 'qdisc', 'add', 'dev', devname, 'root', 'tbf', 'rate',
             '8mbit', 'burst', '50k', 'limit', '100k'], check=True, timeout=30)
        self.vsctl('add-port', 'br0', devname)
        self.assertNotIn('tbf', self.disciplines(devname))
        self.sh(uuid, base.NO_DHCP + 'ip address add 203.0.113.20/24 dev eth0;'
                'ip link set eth0 up')
        base.ping('203.0.113.20')
        self.assert_limited(uuid)
        # A QoS policy of Neutron's comes and goes.
        self.vsctl('set', 'port', devname, 'qos=@q', '--', '--id=@q',
                   'create', 'qos', 'type=linux-htb',
                   'other-config:max-rate=1000000000')
        self.vsctl('set', 'interface', devname, 'ingress_policing_rate=0')
        self.assert_limited(uuid)
        self.vsctl('clear', 'port', devname, 'qos')
        self.vsctl('del-port', 'br0', devname)
        self.vsctl('add-port', 'br0', devname)
        base.ping('203.0.113.20')
        self.assert_limited(uuid)
        self.vsctl('del-port', 'br0', devname)
