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


"""What Nova is told of a host's CPUs, and the agent of a server's."""

import nova.conf
from nova import exception
from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import cpus
from nova_pycontainer import flavor
from nova_pycontainer import host
from nova_pycontainer import migration_data
from tests.unit.driver import base

GIB = 1 << 30
SHARED = {'policy': 'own', 'cpus': None, 'nodes': None}


def numa(*cells, **values):
    """Of a server; each cell is a dictionary."""
    return objects.InstanceNUMATopology(cells=[objects.InstanceNUMACell(**{
        'id': number, 'cpuset': set(), 'pcpuset': set(), 'memory': 512,
        'cpu_policy': None, 'cpu_pinning_raw': None, 'pagesize': None,
        **cell}) for number, cell in enumerate(cells)], **values)


def pinned(*numbers, **values):
    return numa({
        'cpu_policy': 'dedicated', 'pcpuset': set(range(len(numbers))),
        'cpu_pinning_raw': {
            str(vcpu): cpu for vcpu, cpu in enumerate(numbers)}, **values})


class HostTestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.agent.numa = [
            {'id': 0, 'cpus': [0, 1, 2, 3], 'memory_bytes': 6 * GIB,
             'socket': 0, 'cores': [[0, 2], [1, 3]]},
            {'id': 1, 'cpus': [4, 5, 6, 7], 'memory_bytes': 10 * GIB,
             'socket': None, 'cores': [[4, 6], [5, 7]]}]
        self.info = self.agent.host_info()

    def cells(self):
        made = host.Host(self.agent, nova.conf.CONF, 'host1', uuids.node,
                         '192.0.2.1').resources()
        node = objects.ComputeNode()
        node.update_from_virt_driver(made)
        self.assertEqual(len(cpus.shared(self.info)), node.vcpus)
        return objects.NUMATopology.obj_from_db_obj(node.numa_topology).cells

    def test_all_are_shared(self):
        self.assertEqual({*range(8)}, cpus.shared(self.info))
        self.assertEqual(set(), cpus.dedicated(self.info))
        first, second = self.cells()
        self.assertEqual(
            ({0, 1, 2, 3}, set(), 6144, 0, [{0, 2}, {1, 3}]),
            (first.cpuset, first.pcpuset, first.memory, first.socket,
             first.siblings))
        self.assertEqual((1, 10240, None),
                         (second.id, second.memory, second.socket))
        page, = second.mempages
        self.assertEqual(10240 << 10, page.total * page.size_kb)

    def test_divided(self):
        self.flags(cpu_shared_set='0-1', cpu_dedicated_set='4-7,^5,99',
                   group='compute')
        self.assertEqual({0, 1}, cpus.shared(self.info))
        self.assertEqual({4, 6, 7}, cpus.dedicated(self.info))
        first, second = self.cells()
        self.assertEqual([{0}, {1}], first.siblings)
        self.assertEqual(({4, 6, 7}, set(), [{4, 6}, {7}]),
                         (second.pcpuset, second.cpuset, second.siblings))

    def test_none_is_shared(self):
        self.flags(cpu_dedicated_set='0-3', group='compute')
        self.assertEqual(set(), cpus.shared(self.info))
        self.assertEqual(set(), self.cells()[0].cpuset)

    def test_traits(self):
        self.assertEqual({'HW_CPU_HYPERTHREADING'}, cpus.traits(self.info))
        self.agent.numa[0]['cores'] = self.agent.numa[1]['cores'] = [[0]]
        self.assertEqual(set(), cpus.traits(self.info))

    def test_older_agent(self):
        self.flags(cpu_shared_set='1-9', cpu_dedicated_set='0',
                   group='compute')
        del self.info['numa']
        self.assertEqual(({*range(1, 8)}, set(), None, set()), (
            cpus.shared(self.info), cpus.dedicated(self.info),
            cpus.numa_topology(self.info), cpus.traits(self.info)))

    def test_configuration(self):
        cpus.check_configuration()
        for shared, dedicated, words in (
                ('0-3', '3-4', '3'), ('0-x', None, 'x'),
                ('0', '^0', 'cpu_dedicated_set')):
            self.flags(cpu_shared_set=shared, cpu_dedicated_set=dedicated,
                       group='compute')
            error = self.assertRaises(
                exception.InvalidConfiguration, cpus.check_configuration)
            self.assertIn(words, str(error))


class ServerTestCase(base.TestCase):

    def of(self, topology=None):
        return cpus.of(self.make_instance(numa_topology=topology))

    def test_shared(self):
        self.assertEqual(SHARED, self.of())
        self.assertEqual({**SHARED, 'nodes': [3]}, self.of(numa({'id': 3})))
        self.flags(cpu_shared_set='4-6', group='compute')
        self.flags(floating_cpus=True, group='pycontainer')
        self.assertEqual({'policy': 'floating', 'cpus': [4, 5, 6],
                          'nodes': None}, self.of())

    def test_shared_where_there_are_none(self):
        self.flags(cpu_dedicated_set='4-6', group='compute')
        error = self.assertRaises(exception.InvalidInput, self.of)
        self.assertIn('cpu_shared_set', str(error))

    def test_dedicated(self):
        self.assertEqual(
            {'policy': 'dedicated', 'cpus': [2, 7], 'nodes': [1]},
            self.of(pinned(7, 2, id=1)))
        # A host that has none claims nothing, without the scheduler's filter.
        error = self.assertRaises(exception.InvalidInput, self.of, pinned())
        self.assertIn('cpu_dedicated_set', str(error))

    def test_what_containers_do_not_have(self):
        for topology, words in (
                (numa({}, {}), '2 NUMA nodes'),
                (numa({'cpu_policy': 'mixed'}), 'mixed'),
                (numa({'pagesize': 2048}), 'hw:mem_page_size'),
                (numa({'pagesize': -2}), 'hw:mem_page_size'),
                (numa({}, emulator_threads_policy='isolate'),
                 'hw:emulator_threads_policy')):
            error = self.assertRaises(
                exception.InvalidInput, self.of, topology)
            self.assertIn(words, str(error))
        for pagesize in (-1, -3, 4):
            self.of(numa({'pagesize': pagesize}))
        self.assertRaises(
            exception.InvalidInput, flavor.resources, base.make_flavor(
                extra_specs={'hw:cpu_realtime': 'true'}), 512)
        flavor.resources(base.make_flavor(
            extra_specs={'hw:cpu_realtime': 'false'}), 512)

    def test_comes_in_a_live_migration(self):
        def arrives(source, claim):
            data = migration_data.create([], None, None)
            if claim:
                data.dst_numa_info = cpus.claimed(claim)
            data = objects.LibvirtLiveMigrateData.obj_from_primitive(
                data.obj_to_primitive())
            return cpus.of_claimed(
                self.make_instance(numa_topology=source),
                data.dst_numa_info if claim else None)

        self.assertEqual(
            {'policy': 'dedicated', 'cpus': [2, 5], 'nodes': [1]},
            arrives(pinned(0, 1), pinned(5, 2, id=1)))
        self.assertEqual({**SHARED, 'nodes': [1]},
                         arrives(numa({}), numa({'id': 1})))
        self.assertEqual(SHARED, arrives(None, None))
        # Its source's are no answer.
        self.assertRaises(exception.InvalidInput, arrives, pinned(0), None)
