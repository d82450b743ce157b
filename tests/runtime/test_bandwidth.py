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

"""Limits for the bandwidth of interfaces, measured."""

import socket
import subprocess
import time

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import shaping
from tests import cases
from tests.runtime import base
from tests.runtime import hosts
from tests import speed

#: Bytes per second.
_SLOW, _FASTER = 500_000, 2_000_000
#: A kernel without what limits need. That it is told of a kind which it does
#: not know is all that is not real.
_LACKING = '''
from nova_pycontainer.runtime import shaping
from pyroute2.netlink.rtnl import tcmsg
tcmsg.plugins['nosuch'] = tcmsg.plugins[shaping.KIND]
shaping.KIND = 'nosuch'
'''


def _nic(number=1, **limits):
    ident = f'0123456789{number}'
    return {'id': f'{ident}-x', 'devname': f'tap{ident}',
            'mac': f'fa:16:3e:00:00:1{number}', 'mtu': 1450,
            'tx_offload': True, **limits}


_LIMITS = {'inbound': {'average': _SLOW}, 'outbound': {'average': _FASTER}}


class BandwidthTestCase(hosts.TwoHostsTestCase):

    def run_limited(self, **limits):
        uuid = self.run_container(nics=[_nic(**limits)])
        self.up(uuid)
        return uuid

    def up(self, uuid, address='203.0.113.20'):
        self.attach(self.a, uuid)
        self.sh(self.a, uuid, base.NO_DHCP +
                f'ip address add {address}/24 dev eth0; ip link set eth0 up')
        self._ip('neighbour', 'flush', 'to', address)
        base.ping(address)

    def speeds(self, uuid, host=None, name='eth0'):
        return speed.of('203.0.113.1', self._shell(uuid, host), name)

    def _shell(self, uuid, host=None):
        return lambda script: self.sh(host or self.a, uuid, script)

    def assert_limited(self, uuid, host=None, name='eth0'):
        found = self.speeds(uuid, host, name)
        print(*(f'{value / 1000:.0f} kB/s' for value in found))
        for value, limit in zip(found, (_SLOW, _FASTER), strict=True):
            self.assertTrue(limit / 2 < value < limit * 1.5, found)

    def links(self, host=None):
        shown = (host or self.a).run('ip', '-brief', 'link').stdout
        return sorted(line.split()[0].split('@')[0] for line in
                      shown.splitlines() if line.startswith(
                          ('tap', 'nic', 'gst', 'swt', 'new')))

    def test_in_each_life(self):
        uuid = self.run_limited(**_LIMITS)
        self.assert_limited(uuid)
        self.a.kill(uuid)
        self.assertEqual([], self.links())
        self.a.prepare(uuid)
        self.a.start_container(uuid)
        self.up(uuid)
        self.assert_limited(uuid)
        self.a.pause(uuid)
        self.a.unpause(uuid)
        self.assert_limited(uuid)
        self.a.suspend(uuid)
        self.assertEqual([], self.links())
        self.a.resume(uuid)
        self.attach(self.a, uuid)
        base.ping('203.0.113.20')
        self.assert_limited(uuid)
        self.migrate(uuid, self.a, self.b)
        self.assertEqual([], self.links())
        base.ping('203.0.113.20')
        self.assert_limited(uuid, self.b)
        self.b.delete(uuid)
        self.assertEqual([], self.links(self.b))

    def test_without_and_with_others(self):
        """One direction has a limit; and the limit is another one then."""
        uuid = self.run_limited(outbound={'average': _SLOW})
        inbound, outbound = self.speeds(uuid)
        print(inbound, outbound)
        self.assertLess(outbound, _SLOW * 1.5)
        self.assertGreater(inbound, _SLOW * 10)
        self.a.kill(uuid)
        self.a.prepare(uuid, {'nics': [_nic(**_LIMITS)]})
        self.a.start_container(uuid)
        self.up(uuid)
        self.assert_limited(uuid)
        self.a.kill(uuid)
        self.a.prepare(uuid, {'nics': [_nic()]})
        self.a.start_container(uuid)
        self.up(uuid)
        for value in self.speeds(uuid):
            self.assertGreater(value, _FASTER * 5)

    def test_attached_to_one_that_runs(self):
        uuid = self.run_container(address='203.0.113.10')
        before = self.links()
        nic = _nic(**_LIMITS)
        self.a.interface_attach(uuid, nic)
        # The other one would answer for it.
        self.sh(self.a, uuid, 'ip link set eth0 down; '
                'ip address add 203.0.113.20/24 dev eth1; '
                'ip link set eth1 up')
        self.attach(self.a, uuid)
        base.ping('203.0.113.20')
        self.assert_limited(uuid, name='eth1')
        self.a.interface_detach(uuid, nic['devname'])
        self.assertEqual(before, self.links())

    def test_guest_cannot_take_it_away(self):
        uuid = self.run_limited(**_LIMITS)
        pid = self.a.info(uuid)['pid']
        for command in ('tc qdisc replace dev eth0 root pfifo limit 1000',
                        'tc qdisc del dev eth0 root',
                        'tc qdisc add dev eth0 ingress',
                        'ip link set eth0 down', 'ip link set eth0 up',
                        'ip link set eth0 txqueuelen 10000'):
            # With the host's programs, for the guest has no such.
            subprocess.run(
                ['nsenter', '-t', str(pid), '-U', '-n', '-S', '0', '-G', '0',
                 *command.split()], check=True, timeout=30)
        self.assertEqual('eth0 lo', self.sh(
            self.a, uuid, 'cd /sys/class/net; echo *'))
        base.ping('203.0.113.20')
        self.assert_limited(uuid)

    def test_deleted_by_the_guest(self):
        uuid = self.run_limited(**_LIMITS)
        self.sh(self.a, uuid, 'ip link delete eth0')
        self.a.pause(uuid)
        self.a.unpause(uuid)
        self.migrate(uuid, self.a, self.b)
        self.assertEqual('lo', self.sh(
            self.b, uuid, 'cd /sys/class/net; echo *'))
        self.assertEqual([], self.links())
        self.b.delete(uuid)
        self.assertEqual([], self.links(self.b))

    def test_peak(self):
        """What was saved may go at once, but no faster than that."""
        uuid = self.run_limited(outbound={
            'average': 40_000, 'peak': _FASTER, 'burst': 8_000_000})
        found = [speed.outbound('203.0.113.1', self._shell(uuid))
                 for _ in range(4)]
        print(*found)
        self.assertTrue(_FASTER / 2 < found[0] < _FASTER * 1.2, found)
        # It is spent.
        self.assertLess(found[-1], 80_000)

    def test_nothing_comes_of_one_that_is_paused(self):
        """What had to wait then is not sent later, either way."""
        uuid = self.run_limited(
            inbound={'average': 2000}, outbound={'average': 2000})
        nic, = self.a.info(uuid)['nics']
        ends = shaping.ends(nic['devname'])
        # Far more than can go in the time.
        self.sh(self.a, uuid, 'head -c 60000 /dev/zero | '
                'timeout 1 nc -u 203.0.113.1 9 || :')
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(sock.close)
        for _ in range(40):
            sock.sendto(bytes(1400), ('203.0.113.20', 9))

        def sent():
            """By both ends in the middle."""
            return [int(self.a.run('cat', '/sys/class/net/'
                                   f'{name}/statistics/tx_bytes').stdout)
                    for name in ends]

        def more(before):
            return [now - then for now, then in zip(
                sent(), before, strict=True)]

        before = sent()
        base.wait_for(lambda: min(more(before)) > 1400,
                      'frames to wait for their turn')
        self.a.pause(uuid)
        before = sent()
        time.sleep(3)
        # The guest's kernel still asks for addresses by itself.
        self.assertLess(max(more(before)), 1000)
        self.a.unpause(uuid)
        base.ping('203.0.113.20')

    @cases.more
    def test_burst_that_is_too_small(self):
        """For a frame, and for what is due when a timer is late."""
        uuid = self.run_limited(outbound={
            'average': 100_000_000, 'burst': 1})
        self.assertTrue(
            30_000_000 < self.speeds(uuid)[1] < 120_000_000)

    def test_nothing_of_the_host(self):
        """The ends in the middle say nothing to either side."""
        self.run_limited(**_LIMITS)
        names = shaping.ends(_nic()['devname'])
        for name in names:
            self.assertNotIn('inet6', self.a.run(
                'ip', 'address', 'show', 'dev', name).stdout)

    def test_destination_that_cannot(self):
        uuid = self.run_limited(**_LIMITS)
        facts = self.a.migration_check_source(uuid)['facts']
        self.assertEqual([], self.b.migration_check_destination(
            facts)['problems'])
        lacking = self.b.directory / 'lacking'
        lacking.mkdir()
        (lacking / 'sitecustomize.py').write_text(_LACKING)
        self.b.env['PYTHONPATH'] = f'{lacking}:{base.ROOT}'
        self.b.restart_agent(**self.agent_options)
        problem, = self.b.migration_check_destination(facts)['problems']
        self.assertEqual('interface-limits', problem['name'])
        self.assertIn('NET_SCH_TBF', problem['remedy'])
        error = self.assertRaises(
            errors.ContainerError, self.b.plug, uuid, [_nic(**_LIMITS)])
        self.assertEqual('unsupported', error.code)
        self.assertEqual([], self.links(self.b))
        # Others can come.
        self.assertEqual([], self.b.migration_check_destination(
            facts | {'limited_nics': 0})['problems'])


class PlugTestCase(base.HostTestCase):

    def test_half_of_one(self):
        """As an agent leaves it that is killed while it makes one."""
        nic = network.Nic.from_dict(_nic(**_LIMITS))
        self.addCleanup(network.unplug, nic.devname)
        self.assertTrue(network.plug(nic))
        self.assertFalse(network.plug(nic))
        for half in (['link', 'delete', nic.devname],
                     ['link', 'set', nic.devname, 'down', 'name', 'newX']):
            subprocess.run(['ip', *half], check=True, timeout=30)
            self.assertFalse(network.exists(nic))
            self.assertTrue(network.plug(nic))
        before = subprocess.run(['ip', 'link'], stdout=subprocess.PIPE)
        self.assertIn(nic.peer_name.encode(), before.stdout)
        for rest in (nic.peer_name, None):
            if rest:
                # As the guest can.
                subprocess.run(['ip', 'link', 'delete', rest], check=True,
                               timeout=30)
            network.unplug(nic.devname)
            after = subprocess.run(['ip', 'link'], stdout=subprocess.PIPE)
            self.assertNotIn(b'0123456789', after.stdout)

    def test_malformed(self):
        for rate in ({}, {'average': 999}, {'average': 1 << 32},
                     {'average': '5000'}, {'average': True}, [5000],
                     {'average': 5000, 'peak': 4999},
                     {'average': 5000, 'burst': 5000 * 257},
                     {'average': 5000, 'floor': 5000}):
            self.assert_code('invalid', network.Nic.from_dict,
                             _nic(inbound=rate))
