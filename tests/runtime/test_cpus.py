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


"""A guest has as many CPUs as vCPUs, and they are its own."""

import contextlib
import os
import pathlib

from nova_pycontainer.runtime import errors
from tests.runtime import base
from tests.runtime import hosts

#: For all processes of a guest, what the scheduler says.
ALLOWED = "sed -n 's/^Cpus_allowed_list:.//p' /proc/[0-9]*/status | sort -u"


def cpus_of(group, pid):
    """Of every process of a container, as the host's kernel has it."""
    path = pathlib.Path(f'/proc/{pid}/cgroup').read_text()
    assert group in path, path
    top = pathlib.Path('/sys/fs/cgroup') / group
    found = set()
    for directory, _, _ in os.walk(top):
        procs = pathlib.Path(directory, 'cgroup.procs').read_text()
        for process in procs.split():
            # Some only sleep for a moment.
            with contextlib.suppress(ProcessLookupError):
                found.add(frozenset(os.sched_getaffinity(int(process))))
    return found


class CpusTestCase(base.HostTestCase):

    def setUp(self):
        super().setUp()
        if os.cpu_count() < 2:
            self.skipTest('this machine has one CPU')
        self.all = sorted(os.sched_getaffinity(0))

    def run_container(self, *args, cpus=None, vcpus=1, **kwargs):
        spec = self.spec(vcpus=vcpus)
        return super().run_container(*args, vcpus=vcpus, resources={
            **spec['resources'], 'cpus': cpus or {}}, **kwargs)

    def cpus(self, uuid):
        info = self.host.info(uuid)
        found = cpus_of(f'{self.cgroup_parent}/{uuid}', info['pid'])
        self.assertEqual({frozenset(info['cpus'])}, found)
        return info['cpus']

    def nproc(self, uuid):
        return int(self.sh(uuid, 'nproc'))

    def test_as_many_as_vcpus_and_balanced(self):
        first, second = self.run_container(), self.run_container()
        self.assertEqual([1, 1], [self.nproc(first), self.nproc(second)])
        self.assertEqual(
            [1, 1], [len(self.cpus(first)), len(self.cpus(second))])
        self.assertNotEqual(self.cpus(first), self.cpus(second))
        both = self.run_container(vcpus=2)
        self.assertEqual(2, self.nproc(both))
        self.assertEqual(2, len(self.cpus(both)))
        # What one had that has gone is free again.
        free = self.cpus(second)
        self.host.delete(second)
        self.assertEqual(free, self.cpus(self.run_container()))

    def test_more_than_there_are(self):
        uuid = self.run_container(vcpus=64)
        self.assertEqual(self.all, self.cpus(uuid))
        self.assertEqual(len(self.all), self.nproc(uuid))

    def test_of_those_that_it_may_have(self):
        last = self.all[-1]
        found = [self.cpus(self.run_container(cpus={'cpus': [last, 4095]}))
                 for _ in range(3)]
        self.assertEqual([[last]] * 3, found)
        self.assertEqual([last], self.cpus(self.run_container(
            cpus={'policy': 'floating', 'cpus': [last]})))
        floating = self.run_container(cpus={'policy': 'floating'})
        self.assertEqual(self.all, self.cpus(floating))

    def test_dedicated_on_its_node(self):
        first, last = self.all[0], self.all[-1]
        uuid = self.run_container(
            cpus={'policy': 'dedicated', 'cpus': [last], 'nodes': [0]})
        self.assertEqual([last], self.cpus(uuid))
        self.assertEqual(str(last), self.sh(uuid, ALLOWED))
        self.assertEqual('0', self.sh(
            uuid, "sed -n 's/^Mems_allowed_list:.//p' /proc/self/status"))
        # Not chosen for it: another's are none of its business.
        other = self.run_container(
            cpus={'policy': 'dedicated', 'cpus': [first]})
        self.assertEqual([first], self.cpus(other))

    def test_none_is_there(self):
        uuid = '11111111-2222-4333-8444-555555555555'
        for cpus, text in (
                ({'policy': 'dedicated', 'cpus': [0, 4095]}, 'CPUs 4095'),
                ({'cpus': [4094, 4095]}, 'CPUs 4094-4095'),
                ({'nodes': [63]}, 'nodes 63')):
            self.host.define(uuid, self.spec(resources={
                **self.spec()['resources'], 'cpus': cpus}))
            error = self.assert_code('unsupported', self.host.prepare, uuid)
            self.assertIn(text, str(error))
            self.assertIn('online', error.remedy)
            self.assertEqual('defined', self.state(uuid))
            self.host.delete(uuid)
            self.assertEqual([], self.traces(uuid))
        for cpus in ({'policy': 'mine'}, {'policy': 'dedicated'},
                     {'cpus': 'all'}, {'cpus': [-1]}):
            self.assert_code('invalid', self.host.define, uuid, self.spec(
                resources={**self.spec()['resources'], 'cpus': cpus}))

    def test_restarts(self):
        first = self.run_container()
        mine = self.cpus(first)
        # An agent that comes back knows where its guests are.
        self.host.close()
        self.host = self.make_host()
        second = self.run_container()
        self.assertNotEqual(mine, self.cpus(second))
        for restart in (
                lambda: self.host.reboot(first, 0),
                lambda: self.host.reboot(first, 0, {'resources': {
                    **self.host.info(first)['resources'], 'vcpus': 2}})):
            before = self.nproc(first)
            restart()
            self.assertEqual(mine, self.cpus(first)[:1])
            self.wait_started(first)
        self.assertEqual((1, 2), (before, self.nproc(first)))
        self.sh_end(first, 'reboot')
        self.wait_console(first, 'Start-up done')
        base.wait_for(lambda: self.state(first) == 'running', 'a reboot')
        self.assertEqual(2, self.nproc(first))

    def test_numa_nodes(self):
        nodes = self.host.host_info()['numa']
        self.assertEqual(self.all, sorted(
            cpu for node in nodes for cpu in node['cpus']))
        total = sum(node['memory_bytes'] for node in nodes)
        memory = self.host.host_info()['memory_bytes']
        # Some kernels have memory that they tell of no node.
        self.assertTrue(total == memory or len(nodes) > 1 and
                        0 < total < memory, (total, memory))


class MovingTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        if os.cpu_count() < 2:
            self.skipTest('this machine has one CPU')
        super().setUp()

    def cpus(self, host, uuid):
        info = host.info(uuid)
        self.assertEqual({frozenset(info['cpus'])}, cpus_of(
            f'{host.cgroup_parent}/{uuid}', info['pid']))
        self.assertEqual(str(len(info['cpus'])), self.sh(host, uuid, 'nproc'))
        return info['cpus']

    def test_busybox(self):
        uuid = self.run_container()
        self.sh(self.a, uuid, '(while :; do sleep 1; done) >/dev/null 2>&1 &')
        mine = self.cpus(self.a, uuid)
        # What it has here another has there.
        other = self.run_container(host=self.b)
        self.assertEqual(mine, self.cpus(self.b, other))
        self.migrate(uuid, self.a, self.b)
        there = self.cpus(self.b, uuid)
        self.assertNotEqual(mine, there)
        self.assertEqual(','.join(map(str, there)),
                         self.sh(self.b, uuid, ALLOWED))
        # What it had is free again, and what it has not.
        self.assertEqual(mine, self.cpus(self.a, self.run_container()))
        self.b.restart_agent()
        self.assertEqual(there, self.cpus(self.b, uuid))
        self.b.delete(other)
        third = self.run_container(host=self.b)
        self.assertEqual(mine, self.cpus(self.b, third))
        # While it is suspended another takes its place.
        self.b.suspend(uuid)
        fourth = self.run_container(host=self.b)
        self.assertEqual(there, self.cpus(self.b, fourth))
        self.b.delete(third)
        self.b.resume(uuid)
        self.assertEqual(mine, self.cpus(self.b, uuid))

    def test_what_the_destination_says(self):
        """Another number of them, and certain ones."""
        uuid = self.run_container()
        spec = self.a.info(uuid)['spec']
        for source, there, cpus, expected in (
                (self.a, self.b, {'policy': 'floating'}, [0, 1]),
                (self.b, self.a, {'policy': 'dedicated', 'cpus': [1],
                                  'nodes': [0]}, [1])):
            spec = source.info(uuid)['spec']
            self.spec_there = {**spec, 'resources': {
                **spec['resources'], 'cpus': cpus}}
            self.migrate(uuid, source, there)
            self.assertEqual(expected, self.cpus(there, uuid))
        self.spec_there = {**spec, 'resources': {
            **spec['resources'],
            'cpus': {'policy': 'dedicated', 'cpus': [4095]}}}
        error = self.assertRaises(
            errors.ContainerError, self.migrate, uuid, self.a, self.b)
        self.assertIn('4095', str(error))
        self.assertEqual([1], self.cpus(self.a, uuid))
        self.assertEqual([], self.b.list())

    spec_there = None

    def prepare_migration(self, uuid, source, destination, **options):
        if self.spec_there is not None:
            class Told:
                @staticmethod
                def info(uuid, _info=source.info, _spec=self.spec_there):
                    return {**_info(uuid), 'spec': _spec}

                host_info, migration_begin = (
                    source.host_info, source.migration_begin)

            source = Told
        return super().prepare_migration(
            uuid, source, destination, **options)

    def test_debian13(self):
        self.dhcp()
        uuid = self.run_container(
            'debian13', memory=1024,
            init={'argv': ['/sbin/init', 'cloud-init=disabled']})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'systemctl is-system-running || :') in (
                'running', 'degraded'), 'systemd', 240)
        self.cpus(self.a, uuid)
        self.run_container(host=self.b)
        self.migrate(uuid, self.a, self.b)
        self.assertEqual('1', self.sh(
            self.b, uuid, 'systemd-run --quiet --pipe --wait nproc'))
        self.cpus(self.b, uuid)
        self.b.suspend(uuid)
        self.b.resume(uuid)
        self.assertEqual('1', self.sh(
            self.b, uuid, 'systemd-run --quiet --pipe --wait nproc'))
        self.cpus(self.b, uuid)
