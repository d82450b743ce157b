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
"""Many servers at once leave nothing behind."""

from concurrent import futures
import json

from openstack import exceptions

from tests.cloud import base

_COUNT = 20

#: Prints all places of a host where something of a server may be left.
_TRACES = '''
ls /sys/class/net
ip netns
ovs-vsctl --format=csv list Interface
pycontainer list -f json
find /var/lib/pycontainer /run/pycontainer -maxdepth 3
find /sys/fs/cgroup /run/cgroup1 -path "*/pycontainer-*" -maxdepth 5
cat /proc/self/mountinfo
'''


class ParallelTest(base.CloudTestCase):

    def _traces(self, words):
        """Where any of the words still stands on the hosts."""
        found = []
        # Loop devices are the machine's.
        texts = {'losetup': base.run(['losetup', '--list', '--noheadings',
                                      '--output', 'NAME,BACK-FILE'])}
        for host in base.HOSTS:
            texts[host] = self.on_host(host, 'bash', '-euc', _TRACES)
        for place, text in texts.items():
            found.extend((place, word) for word in words if word in text)
        return found

    def test_twenty(self):
        project = self.admin.identity.find_project('demo')
        network = self.admin.network.find_network(
            'private', project_id=project.id)
        image = self.image('busybox')
        flavor = self.demo.compute.find_flavor('pyc.tiny')
        connections = [base.connected('demo', app_name=f'tests-{number}')
                       for number in range(5)]

        def create(number):
            cloud = connections[number % len(connections)]
            server = cloud.compute.create_server(
                name=f'ct-many-{number}', image_id=image.id,
                flavor_id=flavor.id, networks=[{'uuid': network.id}])
            self.addCleanup(self.delete_server, server.id)
            return server.id

        with futures.ThreadPoolExecutor(_COUNT) as pool:
            ids = list(pool.map(create, range(_COUNT)))
        servers = [self.wait_server(server_id, 'ACTIVE', 300)
                   for server_id in ids]
        self.assertEqual(_COUNT, len({server.id for server in servers}))
        # They are what Nova believes: each runs where it says, with its own
        # address and its own range of user ids.
        containers = {host: self.containers(host) for host in base.HOSTS}
        infos = [containers[server.compute_host][server.id]
                 for server in servers]
        self.assertEqual({'running'}, {info['state'] for info in infos})
        self.assertEqual(_COUNT, len({info['base_id'] for info in infos}))
        self.assertEqual(_COUNT, len({nic['mac'] for info in infos
                                      for nic in info['nics']}))
        ports = [port for server_id in ids for port in
                 self.demo.network.ports(device_id=server_id)]
        self.assertEqual([(_COUNT, {'ACTIVE'})],
                         [(len(ports), {port.status for port in ports})])
        words = [*ids, *(f'tap{port.id[:11]}' for port in ports)]
        # What is looked for can be found: each server, each interface.
        self.assertEqual(set(words), {word for _place, word in
                                      self._traces(words)})

        def delete(number):
            cloud = connections[number % len(connections)]
            cloud.compute.delete_server(ids[number])

        with futures.ThreadPoolExecutor(_COUNT) as pool:
            list(pool.map(delete, range(_COUNT)))

        def gone():
            left = {server.id: server.status for server in
                    self.admin.compute.servers(all_projects=True)
                    if server.id in ids}
            self.assertNotIn('ERROR', left.values(), left)
            return not left

        base.wait_for(gone, 300, 'all servers are deleted')
        self.assertEqual([], self._traces(words))
        for port in ports:
            self.assertRaises(exceptions.NotFoundException,
                              self.demo.network.get_port, port.id)
        for provider in self.admin.placement.resource_providers():
            if provider.name in base.HOSTS:
                used = self.admin.placement.get(
                    f'/resource_providers/{provider.id}/allocations').json()
                self.assertEqual([], [server_id for server_id in ids if
                                      server_id in json.dumps(used)])
