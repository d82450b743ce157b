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


"""CPUs of a server's own, through Nova: PCPU, the claims, and the kernel.

Both hosts are this machine, so they have CPUs of the same numbers.
"""

import nova.conf

from tests import cases
from tests.functional import agents
from tests.functional import base
from tests.functional import migration_base

CONF = nova.conf.CONF


class CpusTest(migration_base.TestCase):

    def setUp(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        self.flags(group='filter_scheduler', enabled_filters=[
            *CONF.filter_scheduler.enabled_filters, 'NUMATopologyFilter'])
        super().setUp()
        self.dedicated = self.flavor_with({'hw:cpu_policy': 'dedicated'})

    def flavor_with(self, extra_specs, vcpu=1):
        return self._create_flavor(
            memory_mb=256, vcpu=vcpu, disk=1, ephemeral=0,
            extra_spec=extra_specs)

    def divide(self, **sets):
        """Give the CPUs of both hosts to kinds of servers."""
        self.flags(group='compute', **sets)
        for host in base.HOSTS:
            self.periodic('update_available_resource', host)

    def boot(self, flavor=None, **values):
        if flavor:
            values['flavorRef'] = flavor
        return super().boot(networks='none', **values)

    def refused(self, flavor, words, **values):
        before = self.agents.leftovers('host1')
        server = self.boot(flavor, status='ERROR', **values)
        self.assertIn(words, server['fault']['message'])
        self.delete(server)
        self.assertEqual(before, self.agents.leftovers('host1'))

    def cpus(self, server, host='host1'):
        """By the agent, the kernel, and the guest."""
        client = self.agents.client(host)
        found = client.info(server['id'])['cpus']
        done = client.exec(server['id'], ['/bin/sh', '-c', (
            "nproc; sed -n 's/^\\(Cpu\\|Mem\\)s_allowed_list:.//p' "
            '/proc/self/status')])
        number, cpus, nodes = done['stdout'].decode().split()
        self.assertEqual((len(found), '0'), (int(number), nodes))
        self.assertIn(cpus, (','.join(map(str, found)),
                             f'{found[0]}-{found[-1]}'))
        self.assertIn(
            f'{cpus}\n',
            self.agents.cgroup_says(host, server['id'], 'cpuset.cpus'))
        return found

    def inventory(self, host='host1'):
        found = self._get_provider_inventory(
            self._get_provider_uuid_by_host(host))
        return [found.get(name, {}).get('total')
                for name in ('VCPU', 'PCPU')]

    def test_inventory(self):
        self.periodic('update_available_resource')
        self.assertEqual([2, None], self.inventory())
        self.divide(cpu_dedicated_set='1')
        self.assertEqual([None, 1], self.inventory())
        self.divide(cpu_shared_set='0', cpu_dedicated_set='1,4095')
        self.assertEqual([1, 1], self.inventory())

    def test_dedicated_and_shared(self):
        self.divide(cpu_shared_set='0', cpu_dedicated_set='1')
        server = self.boot(self.dedicated)
        self.assertEqual([1], self.cpus(server))
        self.assertEqual([1], self.pinned('host1'))
        usages = self._get_allocations_by_server_uuid(server['id'])
        used, = (found['resources'] for found in usages.values())
        self.assertEqual((1, None), (used['PCPU'], used.get('VCPU')))
        # There is one.
        self.refused(self.dedicated, 'No valid host')
        others = [self.boot(), self.boot()]
        self.assertEqual([[0], [0]], [self.cpus(o) for o in others])
        # It has it for as long as it is there, whatever becomes of it.
        self.action(server, 'SUSPENDED', 'suspend')
        self.action(server, 'ACTIVE', 'resume')
        self.assertEqual([1], self.cpus(server))
        self.action(server, 'SHUTOFF', 'os-stop')
        self.refused(self.dedicated, 'No valid host')
        self.action(server, 'ACTIVE', 'os-start')
        self.assertEqual([1], self.cpus(server))
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assertEqual([1], self.cpus(server))
        self.action(server, 'ACTIVE', 'rebuild',
                    {'imageRef': self.image})
        self.assertEqual([1], self.cpus(server))
        self.action(server, 'RESCUE', 'rescue',
                    {'rescue_image_ref': self.image})
        self.assertEqual([1], self.cpus(server))
        self.action(server, 'ACTIVE', 'unrescue')
        self.assertEqual([1], self.cpus(server))
        self.restart()
        self.assertEqual([1], self.pinned('host1'))
        self.delete(server)
        self.assertEqual([], self.pinned('host1'))
        self.assertEqual([1], self.cpus(self.boot(self.dedicated)))

    @cases.more
    def test_floating(self):
        server = self.boot()
        self.assertEqual(1, len(self.cpus(server)))
        self.flags(floating_cpus=True, group='pycontainer')
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assertEqual([0, 1], self.cpus(server))

    @cases.more
    def test_one_numa_node(self):
        server = self.boot(self.flavor_with({
            'hw:numa_nodes': '1', 'hw:mem_page_size': 'small'}))
        self.assertEqual(1, len(self.cpus(server)))

    def test_resize(self):
        self.divide(cpu_shared_set='0', cpu_dedicated_set='1')
        self.flags(allow_resize_to_same_host=False)
        server = self.boot()
        self.assertEqual([0], self.cpus(server))
        for finish, end in (('revertResize', ('host1', [0])),
                            ('confirmResize', ('host2', [1]))):
            self.action(server, 'VERIFY_RESIZE', 'resize',
                        {'flavorRef': self.dedicated})
            self.assertEqual([1], self.cpus(server, 'host2'))
            self.assertEqual([1], self.pinned('host2'))
            self.action(server, 'ACTIVE', finish)
            self.assertEqual(end, (
                self.host(server), self.cpus(server, self.host(server))))
        # A cold migration, which takes it to another one.
        self.delete(server)
        self.divide(cpu_shared_set=None, cpu_dedicated_set='0-1')
        self.boot(self.dedicated, host='host2')
        server = self.boot(self.dedicated)
        self.assertEqual([0], self.cpus(server))
        self.action(server, 'VERIFY_RESIZE', 'migrate')
        self.assertEqual([1], self.cpus(server, 'host2'))
        self.assertEqual(([0], [0, 1]),
                         (self.pinned('host1'), self.pinned('host2')))
        self.action(server, 'ACTIVE', 'confirmResize')
        self.assertEqual([1], self.cpus(server, 'host2'))
        self.assertEqual(([], [0, 1]),
                         (self.pinned('host1'), self.pinned('host2')))

    def test_live_migration(self):
        self.divide(cpu_dedicated_set='0-1')
        there = self.boot(self.dedicated, host='host2')
        server = self.boot(self.dedicated)
        self.assertEqual([[0], [0]], [
            self.cpus(server), self.cpus(there, 'host2')])
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assertEqual([1], self.cpus(server, 'host2'))
        self.assertEqual(['host2'], self.allocations(server))
        self.assertEqual(([], [0, 1]),
                         (self.pinned('host1'), self.pinned('host2')))
        # What Nova has written down is what it is started with.
        self.action(server, 'ACTIVE', 'reboot', {'type': 'HARD'})
        self.assertEqual([1], self.cpus(server, 'host2'))
        # There is no room for another.
        third = self.boot(self.dedicated)
        self.migrate(third)
        self.wait_for_migration(third, 'error')
        self.assertIn('No valid host', self.reason(third))
        self.assertEqual([0], self.cpus(third))
        self.assertEqual(([0], [0, 1]),
                         (self.pinned('host1'), self.pinned('host2')))

    @cases.more
    def test_live_migration_that_fails(self):
        self.divide(cpu_dedicated_set='0-1')
        self.boot(self.dedicated, host='host2')
        server = self.boot(self.dedicated)
        self.restart_agent(
            'host2', PYCONTAINER_FAULTS='destination.prepared=raise')
        self.migrate(server)
        self.wait_for_migration(server, 'error', 'failed')
        self.assertEqual([0], self.cpus(server))
        self.assertEqual(['host1'], self.allocations(server))
        self.assertEqual(([0], [0]),
                         (self.pinned('host1'), self.pinned('host2')))

    @cases.more
    def test_live_migration_of_others(self):
        self.divide(cpu_shared_set='0', cpu_dedicated_set='1')
        server = self.boot()
        self.divide(cpu_shared_set='1', cpu_dedicated_set='0')
        self.assertEqual([0], self.cpus(server))
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assertEqual([1], self.cpus(server, 'host2'))

    def test_what_containers_do_not_have(self):
        self.divide(cpu_dedicated_set='0-1')
        for more, words in (
                ({'hw:cpu_realtime': 'yes', 'hw:cpu_realtime_mask': '^0'},
                 'hw:cpu_realtime'),
                ({'hw:emulator_threads_policy': 'share'},
                 'hw:emulator_threads_policy')):
            self.refused(self.flavor_with(
                {'hw:cpu_policy': 'dedicated', **more}, vcpu=2), words)
        self.divide(cpu_shared_set='0', cpu_dedicated_set='1')
        self.refused(self.flavor_with({
            'hw:cpu_policy': 'mixed', 'hw:cpu_dedicated_mask': '1'}, vcpu=2),
            'hw:cpu_policy=mixed')
        self.refused(self.flavor_with({'hw:mem_page_size': 'large'}),
                     'No valid host')
        self.refused(self.flavor_with({'hw:numa_nodes': '2'}, vcpu=2),
                     'No valid host')
