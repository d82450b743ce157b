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

"""``quota:vif_*`` of a flavor, through Nova: what a guest really gets."""

import subprocess

import fixtures

from tests.functional import agents
from tests.functional import base
from tests.functional import migration_base
from tests import speed

#: In kB/s, to the guest and from it.
_SLOW, _FASTER = (400, 800), (3000, 6000)
#: The network of the test and the guest.
_OURS, _GUESTS = '203.0.113.1', '203.0.113.2'


class Base(migration_base.TestCase):

    def flavor_with(self, limits, **more):
        inbound, outbound = limits
        return self._create_flavor(
            memory_mb=256, vcpu=1, disk=1, ephemeral=0, extra_spec={
                'quota:vif_inbound_average': str(inbound),
                'quota:vif_outbound_average': str(outbound), **more})

    def boot(self, flavor, **values):
        return super().boot(flavorRef=flavor, **values)


class BandwidthTest(Base):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        super().setUp()

    def assert_speed(self, server, limits, host='host1', nic=0):
        """Of one interface of the server, measured."""
        client = self.agents.client(host)

        def shell(script):
            done = client.exec(server['id'], ['/bin/sh', '-c', script])
            self.assertEqual(0, done['exit_code'], done['stderr'])
            return done['stdout'].decode()

        name = f'eth{nic}'
        devname = self.info(server, host)['nics'][nic]['devname']
        shell(f'ip -4 address flush dev {name}; '
              f'ip address add {_GUESTS}/24 dev {name}; '
              f'ip link set {name} up')
        self.ip('address', 'add', f'{_OURS}/24', 'dev', devname)
        try:
            found = speed.of(_OURS, shell, name)
        finally:
            self.ip('address', 'del', f'{_OURS}/24', 'dev', devname)
            shell(f'ip address del {_GUESTS}/24 dev {name}')
        print(*(f'{value / 1000:.0f} of {limit} kB/s' for value, limit in zip(
            found, limits, strict=True)))
        for value, limit in zip(found, limits, strict=True):
            self.assertTrue(limit * 500 < value < limit * 1500, found)

    @staticmethod
    def ip(*argv):
        subprocess.run(['ip', *argv], check=True, timeout=agents.PATIENCE)

    def test_from_boot_to_deletion(self):
        server = self.boot(self.flavor_with(_SLOW))
        self.assert_speed(server, _SLOW)
        port = self.neutron.create_port(
            {'port': self.neutron.port_2})['port']['id']
        self.api.attach_interface(
            server['id'], {'interfaceAttachment': {'port_id': port}})
        self.wait_for(lambda: len(self.info(server)['nics']) == 2,
                      'the second interface')
        self.assert_speed(server, _SLOW, nic=1)
        self.api.detach_interface(server['id'], port)
        self.wait_for(lambda: len(self.plugged) == 1, 'the end of it')
        self.action(server, 'SHUTOFF', 'os-stop')
        self.action(server, 'ACTIVE', 'os-start')
        self.assert_speed(server, _SLOW)
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assert_speed(server, _SLOW)
        # What nova-compute does with every server when it starts.
        self.restart()
        self.assert_speed(server, _SLOW)
        self.delete(server)
        self.assert_nothing_left()

    def test_resize(self):
        server = self.boot(self.flavor_with(_SLOW))
        self.action(server, 'VERIFY_RESIZE', 'resize',
                    {'flavorRef': self.flavor_with(_FASTER)})
        host = self.host(server)
        self.assert_speed(server, _FASTER, host)
        self.action(server, 'ACTIVE', 'revertResize')
        self.assert_speed(server, _SLOW)
        self.delete(server)
        for host in base.HOSTS:
            self.assert_nothing_left(host)

    def test_what_containers_do_not_have(self):
        for more, words in (
                ({'quota:vif_limit': '10'}, 'quota:vif_limit'),
                ({'quota:vif_inbound_peak': '5'}, 'quota:vif_inbound_peak')):
            server = self.boot(
                self.flavor_with(_SLOW, **more), status='ERROR')
            self.assertIn(words, server['fault']['message'])
            self.delete(server)
            self.assert_nothing_left()

    def lacking(self, host):
        """Restart its agent as on a kernel that knows no such discipline."""
        lacking = self.agents.directory(host) / 'lacking'
        lacking.mkdir()
        (lacking / 'sitecustomize.py').write_text(
            'from nova_pycontainer.runtime import shaping\n'
            'from pyroute2.netlink.rtnl import tcmsg\n'
            'tcmsg.plugins["nosuch"] = tcmsg.plugins[shaping.KIND]\n'
            'shaping.KIND = "nosuch"\n')
        self.restart_agent(host, PYTHONPATH=f'{lacking}:{agents.ROOT}')

    def test_host_that_cannot(self):
        # What that host says is the end of it.
        self.flags(max_attempts=1, group='scheduler')
        self.lacking('host1')
        server = self.boot(self.flavor_with(_SLOW), status='ERROR')
        self.assertIn('this host cannot limit interfaces',
                      server['fault']['message'])
        self.assertIn('NET_SCH_TBF', server['fault']['message'])
        self.delete(server)
        self.assert_nothing_left()
        # Others can.
        self.delete(self.boot(self.flavor))


class LiveMigrationTest(Base):
    """With agents in memory: two real ones in one network namespace cannot
    both have the interface. See tests.runtime.test_bandwidth for those.
    """

    def setUp(self):
        self.useFixture(fixtures.MonkeyPatch(
            'tests.functional.agents.Agents', agents.InMemory))
        super().setUp()

    def test_limits_are_those_of_the_flavor(self):
        server = self.boot(self.flavor_with(_SLOW))
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        nic, = self.info(server, 'host2')['nics']
        for direction, limit in zip(
                ('inbound', 'outbound'), _SLOW, strict=True):
            self.assertEqual(
                {'average': limit * 1000, 'peak': None, 'burst': None},
                nic[direction])
        self.delete(server)
