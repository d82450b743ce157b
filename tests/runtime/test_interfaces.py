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

"""Interfaces that come and go while a container runs."""

import signal
import subprocess
import sys

from nova_pycontainer.runtime import errors
from tests.runtime import base
from tests.runtime import hosts

_BOUND = '''
import os, socket, time
while not os.path.exists("/sys/class/net/eth1"):
    time.sleep(0.02)
bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth1")
bound.bind(("0.0.0.0", 68))
packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
packets.bind(("eth1", 0x800))
listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
while True:
    try:
        listening.bind(("203.0.113.11", 80))
        break
    except OSError:
        time.sleep(0.02)
listening.listen()
open("/run/bound", "w").close()
while True:
    time.sleep(1000)
'''

#: Binds to another address, that it does not have, all the time.
_BINDS = '''
import itertools, socket, time
IP_FREEBIND = 15
for number in itertools.count():
    bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    bound.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
    bound.bind(("198.18.0.%d" % (number % 250), 68))
    open("/run/bound", "w").close()
    time.sleep(0.001)
'''

#: Prints the frames of a guest's that come after a signal, at its end.
_LISTEN = '''
import signal, socket, sys
mac, frames = bytes.fromhex(sys.argv[2].replace(":", "")), []
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
sock.bind((sys.argv[1], 0))
signal.signal(signal.SIGUSR1, lambda *_: frames.clear())
def end(*_):
    print(frames, flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("listening", flush=True)
while True:
    try:
        frame = sock.recv(2048)
    except OSError:
        # The interface goes with the guest.
        signal.pause()
        continue
    if frame[6:12] == mac:
        frames.append(frame[:42].hex())
'''


def _nic(number):
    ident = f'0123456789{number}'
    return {'id': f'{ident}-x', 'devname': f'tap{ident}',
            'mac': f'fa:16:3e:00:01:0{number}', 'mtu': 1450,
            'tx_offload': True}


class InterfacesTestCase(hosts.TwoHostsTestCase):

    def _names(self, uuid, host=None):
        return self.sh(host or self.a, uuid,
                       'cd /sys/class/net; echo eth*').split()

    def _plug(self, uuid, number, host=None):
        nic = _nic(number)
        (host or self.a).interface_attach(uuid, nic)
        self.attach(host or self.a, uuid)
        return nic

    def _up(self, uuid, name, address):
        self.sh(self.a, uuid, f'ip address add {address}/24 dev {name}; '
                f'ip link set {name} up')
        base.ping(address)

    def test_to_and_fro(self):
        uuid = self.run_container(address='203.0.113.10')
        first, = self.a.info(uuid)['nics']
        nic = self._plug(uuid, 1)
        self.assertEqual(['eth0', 'eth1'], self._names(uuid))
        inside = '/sys/class/net/eth1'
        self.assertEqual([nic['mac'], '1450'], self.sh(
            self.a, uuid, f'cat {inside}/address {inside}/mtu').split())
        self._up(uuid, 'eth1', '203.0.113.11')
        # Twice is once.
        self.a.interface_attach(uuid, nic)
        self.assertEqual(2, len(self.a.info(uuid)['nics']))
        self.a.interface_detach(uuid, first['devname'])
        self.assertEqual(['eth1'], self._names(uuid))
        base.ping('203.0.113.11')
        self.a.interface_detach(uuid, first['devname'])
        # The name that is free is taken first.
        self._plug(uuid, 2)
        self.assertEqual(['eth0', 'eth1'], self._names(uuid))
        self.assertEqual([nic['id'], _nic(2)['id']], [
            n['id'] for n in self.a.info(uuid)['nics']])

    @staticmethod
    def _inside(host, uuid, *argv):
        return host.run('nsenter', '-t', str(host.info(uuid)['pid']), '-n',
                        *argv).stdout

    def _neighbour(self, uuid, address, state):
        self._inside(self.a, uuid, 'ip', 'neigh', 'replace', address, 'dev',
                     'eth0', 'lladdr', '02:00:00:00:00:77', 'nud', state)

    def test_source_asks_nobody(self):
        """While its pages follow; the switch would learn the wrong way."""
        uuid = self.run_container(address='203.0.113.10')
        # Memory of its own, which follows; files in memory do not.
        self.sh(self.a, uuid,
                "setsid sh -c 'x=$(head -c 8388608 /dev/urandom | base64); "
                "touch /run/ready; while :; do sleep 1; done' "
                '</dev/null >/dev/null 2>&1 & '
                'while [ ! -e /run/ready ]; do sleep 0.1; done')
        nic, = self.a.info(uuid)['nics']
        heard = subprocess.Popen(
            self.a.enter(sys.executable, '-c', _LISTEN, nic['devname'],
                         nic['mac']), stdout=subprocess.PIPE, text=True)
        self.addCleanup(heard.wait, 10)
        self.addCleanup(heard.kill)
        self.addCleanup(heard.stdout.close)
        self.assertEqual('listening\n', heard.stdout.readline())
        # The kernel asks it in five seconds.
        self._neighbour(uuid, '203.0.113.77', 'delay')
        migration = self.prepare_migration(
            uuid, self.a, self.b, strategy='post-copy',
            permit_post_copy=True, bandwidth=1 << 20)
        base.wait_for(lambda: self.a.migration_status(migration)['phase'] ==
                      'running', 'the guest to run there')
        heard.send_signal(signal.SIGUSR1)
        self.finish_migration(uuid, migration, self.a, self.b)
        heard.send_signal(signal.SIGTERM)
        self.assertEqual('[]\n', heard.stdout.readline())
        base.ping('203.0.113.10')

    def test_neighbours_that_were_set_by_hand(self):
        uuid = self.run_container(address='203.0.113.10')
        base.ping('203.0.113.10')
        self._neighbour(uuid, '203.0.113.77', 'permanent')
        self.migrate(uuid, self.a, self.b)
        self.assertIn('PERMANENT', self._inside(
            self.b, uuid, 'ip', 'neigh', 'show', '203.0.113.77'))
        base.ping('203.0.113.10')

    def test_migrated_under_its_name(self):
        """The only one left is not the first, and one has a new name."""
        uuid = self.run_container(address='203.0.113.10')
        first, = self.a.info(uuid)['nics']
        self._plug(uuid, 1)
        self._up(uuid, 'eth1', '203.0.113.11')
        self.a.interface_detach(uuid, first['devname'])
        self._plug(uuid, 2)
        self.sh(self.a, uuid, 'ip link set eth0 name lan0')
        self._up(uuid, 'lan0', '203.0.113.12')
        here, there = self.a, self.b
        for _ in range(2):
            self.migrate(uuid, here, there)
            here, there = there, here
            base.ping('203.0.113.11')
            base.ping('203.0.113.12')
            self.assertEqual(
                'eth1 lan0', self.sh(here, uuid, 'cd /sys/class/net; '
                                     'echo eth* lan*'))
        self.a.suspend(uuid)
        self.a.resume(uuid)
        self.attach(self.a, uuid)
        base.ping('203.0.113.12')

    def test_deleted_by_the_guest(self):
        uuid = self.run_container(address='203.0.113.10')
        self._plug(uuid, 1)
        self._up(uuid, 'eth1', '203.0.113.11')
        self.sh(self.a, uuid, 'ip link delete eth0')
        self.migrate(uuid, self.a, self.b)
        base.ping('203.0.113.11')
        self.assertEqual(['eth1'], self._names(uuid, self.b))

    def test_detached_from_under_a_socket(self):
        """Its owner keeps it, as systemd-networkd does."""
        uuid = self.run_container('debian13', address='203.0.113.10', init={
            'argv': ['/usr/bin/python3', '-c', _BOUND]})
        nic = self._plug(uuid, 1)
        self._up(uuid, 'eth1', '203.0.113.11')
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/bound || :'), 'the socket')
        self.a.interface_detach(uuid, nic['devname'])
        self.migrate(uuid, self.a, self.b)
        base.ping('203.0.113.10')
        self.b.suspend(uuid)
        self.b.resume(uuid)
        # What was lent to bind it is gone again.
        self.assertEqual('', self.sh(
            self.b, uuid, 'ip -4 -brief address | grep 203.0.113.11 || :'))
        self.assertIn('0B7100CB:0050', self.sh(
            self.b, uuid, 'cat /proc/net/tcp'))

    def test_bound_at_the_last_moment(self):
        """As a DHCP client does with the address that it is about to have.
        """
        uuid = self.run_container('debian13', init={
            'argv': ['/usr/bin/python3', '-c', _BINDS]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /run/bound || :'), 'the socket')
        self.migrate(uuid, self.a, self.b)
        self.b.suspend(uuid)
        self.b.resume(uuid)
        self.sh(self.b, uuid, 'rm /run/bound')
        base.wait_for(lambda: self.sh(
            self.b, uuid, 'ls /run/bound || :'), 'the next socket')

    def test_of_a_stopped_one(self):
        uuid = self.run_container()
        self.a.kill(uuid)
        self.a.interface_attach(uuid, _nic(1))
        self.a.prepare(uuid)
        self.a.start_container(uuid)
        self.assertEqual(['eth0'], self._names(uuid))
        self.a.kill(uuid)
        self.a.interface_detach(uuid, _nic(1)['devname'])
        self.a.prepare(uuid)
        self.a.start_container(uuid)
        self.assertEqual(['eth*'], self._names(uuid))

    def test_names_that_criu_would_misread(self):
        uuid = self.run_container(address='203.0.113.10')
        self.sh(self.a, uuid, 'ip link set eth0 down; '
                "ip link set eth0 name 'a]b'")
        error = self.assertRaises(AssertionError, self.migrate, uuid, self.a,
                                  self.b)
        self.assertIn('Rename it in the guest', str(error))
        self.assertEqual('running', self.a.info(uuid)['state'])

    def test_not_while_suspended(self):
        uuid = self.run_container()
        self.a.suspend(uuid)
        error = self.assertRaises(
            errors.ContainerError, self.a.interface_attach, uuid, _nic(1))
        self.assertEqual('bad_state', error.code)
        self.a.resume(uuid)
