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


"""Who gets which CPUs, and what the kernel is told of it."""

import pathlib

import fixtures
import testtools
from testtools import matchers

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime import errors
from tests import cases

Wanted, Policy = cpuset.Wanted, cpuset.Policy


def node(number, cpus, threads=1):
    """A NUMA node whose cores have that many threads, side by side."""
    cpus = sorted(cpus)
    return cpuset.Node(
        number, frozenset(cpus), 1 << 30, number, tuple(
            frozenset(cpus[i:i + threads])
            for i in range(0, len(cpus), threads)))


class ListsTestCase(testtools.TestCase):

    def test_the_kernels_notation(self):
        for text, numbers in (('', ()), ('0', (0,)),
                              ('0-3,6', (0, 1, 2, 3, 6)),
                              ('1,3-4,8-9', (1, 3, 4, 8, 9))):
            self.assertEqual(frozenset(numbers), cpuset.parse(text + '\n'))
            self.assertEqual(text, cpuset.listing(numbers))


class PoolTestCase(testtools.TestCase):

    def pool(self, *nodes, available=None):
        self.available = (frozenset().union(*(n.cpus for n in nodes))
                          if available is None else frozenset(available))
        return cpuset.Pool(lambda: self.available, lambda: nodes)

    def take(self, pool, name, vcpus=1, **wanted):
        share = pool.take(name, Wanted(**wanted), vcpus)
        self.assertEqual(share, pool.of(name))
        return share.cpus and cpuset.listing(share.cpus)

    def test_the_least_loaded(self):
        pool = self.pool(node(0, range(4)))
        self.assertEqual(['0', '1', '2-3', '0', '1'], [
            self.take(pool, name, vcpus)
            for name, vcpus in (('a', 1), ('b', 1), ('c', 2), ('d', 1),
                                ('e', 1))])
        pool.give_back('b')
        pool.give_back('b')
        pool.give_back('e')
        self.assertEqual('1', self.take(pool, 'f'))

    def test_a_guest_that_starts_again_counts_once(self):
        pool = self.pool(node(0, range(2)))
        for _ in range(3):
            self.assertEqual('0', self.take(pool, 'a'))
        self.assertEqual('1', self.take(pool, 'b'))

    def test_wide_ones_weigh_what_they_have_of_each(self):
        pool = self.pool(node(0, range(3)))
        # One and a half on each, one on the third.
        pool.note('a', frozenset((0, 1)), 3)
        pool.note('b', frozenset((2,)), 1)
        self.assertEqual('2', self.take(pool, 'c'))

    def test_one_node_if_it_costs_nothing(self):
        pool = self.pool(node(0, range(4)), node(1, range(4, 8)))
        pool.note('a', frozenset((0,)), 1)
        self.assertEqual('4-7', self.take(pool, 'b', 4))
        # Node 0 has three left, the other none.
        self.assertEqual('1-3', self.take(pool, 'c', 3))
        pool = self.pool(node(0, range(2)), node(1, range(2, 4)))
        pool.note('a', frozenset((0,)), 1)
        pool.note('b', frozenset((2,)), 1)
        self.assertEqual('1,3', self.take(pool, 'c', 2))

    def test_cores_before_threads(self):
        pool = self.pool(node(0, range(8), threads=2))
        self.assertEqual('0,2', self.take(pool, 'a', 2))
        self.assertEqual('4,6', self.take(pool, 'b', 2))
        self.assertEqual('1,3', self.take(pool, 'c', 2))

    def test_what_is_permitted(self):
        pool = self.pool(node(0, range(4)), node(1, range(4, 8)))
        some = frozenset((1, 6, 7, 99))
        self.assertEqual('1', self.take(pool, 'a', cpus=some))
        self.assertEqual('6-7', self.take(pool, 'b', 2, cpus=some))
        self.assertEqual('1,6-7', self.take(pool, 'c', 9, cpus=some))
        self.assertEqual('6', self.take(
            pool, 'd', cpus=some, nodes=frozenset((1,))))
        self.assertEqual(frozenset((1,)), pool.of('d').nodes)

    def test_floating(self):
        pool = self.pool(node(0, range(4)))
        self.assertIsNone(self.take(pool, 'a', policy=Policy.FLOATING))
        self.assertEqual('1-2', self.take(
            pool, 'b', policy=Policy.FLOATING, cpus=frozenset((1, 2))))
        # The first counts everywhere, the second in two places.
        self.assertEqual(['0', '3'], [
            self.take(pool, name) for name in 'cd'])

    def test_dedicated(self):
        pool = self.pool(node(0, range(4)))
        mine = frozenset((1, 3))
        self.assertEqual('1,3', self.take(
            pool, 'a', policy=Policy.DEDICATED, cpus=mine))
        self.available -= {3}
        error = self.assertRaises(
            errors.ContainerError, self.take, pool, 'a',
            policy=Policy.DEDICATED, cpus=mine)
        self.assertIn('CPUs 3,', str(error))
        self.assertEqual(cpuset.Share(), pool.of('a'))

    def test_nothing_is_online(self):
        pool = self.pool(node(0, range(2)))
        for wanted in ({'cpus': frozenset((5,))},
                       {'nodes': frozenset((1,))}):
            error = self.assertRaises(
                errors.ContainerError, self.take, pool, 'a', **wanted)
            self.assertEqual('unsupported', error.code)
            self.assertIn('cpu_shared_set', error.remedy)

    def test_no_controller(self):
        pool = cpuset.Pool(lambda: None, lambda: (node(0, range(2)),))
        self.assertIsNone(self.take(pool, 'a'))
        error = self.assertRaises(
            errors.ContainerError, self.take, pool, 'a',
            policy=Policy.DEDICATED, cpus=frozenset((0,)))
        self.assertIn('cpuset', error.remedy)


class NodesTestCase(cases.TestCase):

    def host(self, **files):
        self.top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        for name, content in {
                'cpu/online': '0-3,5', **files}.items():
            path = self.top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + '\n')
        return cpuset.nodes(self.top)

    def test_nodes_cores_and_sockets(self):
        cpus = {f'cpu/cpu{n}/topology/thread_siblings_list': siblings
                for n, siblings in enumerate(
                    ('0,2', '1,3', '0,2', '1,3', '4-5', '4-5'))}
        cpus |= {f'cpu/cpu{n}/topology/physical_package_id': str(package)
                 for n, package in enumerate((0, 1, 0, 1, 1, 1))}
        first, second = self.host(**cpus, **{
            'node/node0/cpulist': '0,2', 'node/node10/cpulist': '1,3-5',
            'node/node2/cpulist': '',
            'node/node0/meminfo': 'Node 0 MemTotal:  2048 kB',
            'node/node10/meminfo': 'Node 10 MemTotal:  4096 kB'})
        self.assertEqual(
            {'id': 0, 'cpus': [0, 2], 'memory_bytes': 2 << 20, 'socket': 0,
             'cores': [[0, 2]]}, first.to_dict())
        # CPU 4 is offline.
        self.assertEqual(
            {'id': 10, 'cpus': [1, 3, 5], 'memory_bytes': 4 << 20,
             'socket': 1, 'cores': [[1, 3], [5]]}, second.to_dict())

    def test_one_node_has_all_memory(self):
        found, = self.host(**{
            'node/node0/cpulist': '0-3,5',
            'node/node0/meminfo': 'Node 0 MemTotal:  2048 kB'})
        self.assertThat(found.memory_bytes, matchers.GreaterThan(1 << 26))

    def test_a_kernel_without_numa(self):
        found, = self.host()
        self.assertEqual((0, {0, 1, 2, 3, 5}, None),
                         (found.id, found.cpus, found.socket))
        self.assertThat(found.memory_bytes, matchers.GreaterThan(1 << 26))


class Tree(cgroup.Hierarchies):
    """Hierarchies of plain files."""

    def __init__(self, v2, v1=None):
        self.v2, self.v1 = v2, {} if v1 is None else {'cpuset': v1}
        self.v2_controllers = frozenset(() if v1 else ('cpuset', 'memory'))


class CgroupTestCase(cases.TestCase):
    """What is written where. That kernels heed it is tests.runtime's."""

    def setUp(self):
        super().setUp()
        self.top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.limits = cgroup.Limits(cpus=cpuset.Share(
            frozenset((1, 2, 3)), frozenset((0,))))

    def test_v2(self):
        (self.top / 'cgroup.controllers').write_text('cpuset memory')
        (self.top / 'cgroup.subtree_control').write_text('cpuset memory')
        (self.top / 'a').mkdir()
        (self.top / 'a/cgroup.controllers').write_text('cpuset memory')
        (self.top / 'a/cgroup.subtree_control').write_text('cpuset memory')
        tree = Tree(self.top)
        group = cgroup.Cgroup(tree, 'a/b')
        group.create_v2(self.limits)
        self.assertEqual('1-3', (self.top / 'a/b/cpuset.cpus').read_text())
        self.assertEqual('0', (self.top / 'a/b/cpuset.mems').read_text())
        self.assertEqual(
            {'cpu': {'cpus': '1-3', 'mems': '0'}},
            group.oci_resources(self.limits, []))
        self.assertEqual({}, group.oci_resources(cgroup.Limits(), []))

    def test_v2_of_the_innermost_that_tells(self):
        tree = Tree(self.top)
        self.assertIsNone(tree.cpus('a/b'))
        (self.top / 'cpuset.cpus.effective').write_text('0-7\n')
        self.assertEqual(frozenset(range(8)), tree.cpus('a/b'))
        (self.top / 'a').mkdir()
        (self.top / 'a/cpuset.cpus.effective').write_text('2-3\n')
        self.assertEqual({2, 3}, tree.cpus('a/b'))

    def test_v1(self):
        v1 = self.top / 'cpuset'
        for name, content in (('.', '0-7'), ('a', ''), ('a/b', '')):
            (v1 / name).mkdir(parents=True)
            (v1 / name / 'cpuset.cpus').write_text(content)
            (v1 / name / 'cpuset.mems').write_text(content and '0-1')
        tree = Tree(self.top, v1)
        group = cgroup.Cgroup(tree, 'a/b')
        group.create_legacy(self.limits)
        self.assertEqual('0-7', (v1 / 'a/cpuset.cpus').read_text())
        self.assertEqual('1-3', (v1 / 'a/b/cpuset.cpus').read_text())
        self.assertEqual('0', (v1 / 'a/b/cpuset.mems').read_text())
        # The OCI runtime knows of v2 only.
        self.assertEqual({}, group.oci_resources(self.limits, []))
