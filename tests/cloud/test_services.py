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

"""The cloud itself: its services, its hosts, its network."""

import json
import uuid

from tests.cloud import base

#: Plugs a port as nova-compute does, started as the user that it runs as.
_PLUG = '''
import sys
from oslo_config import cfg
import os_vif
from os_vif.objects import instance_info
from os_vif.objects import network
from os_vif.objects import subnet
from os_vif.objects import vif
cfg.CONF(['--config-file', '/etc/nova/nova.conf'], project='nova')
os_vif.initialize()
verb, port, mac = sys.argv[1:]
profile = vif.VIFPortProfileOpenVSwitch(
    interface_id=port, create_port=True, datapath_type='netdev')
device = vif.VIFOpenVSwitch(
    id=port, address=mac, plugin='ovs', bridge_name='br-int',
    vif_name='tap' + port[:11], port_profile=profile, active=False,
    preserve_on_delete=False, has_traffic_filtering=True,
    network=network.Network(id=port, bridge='br-int', vlan=None,
                            subnets=subnet.SubnetList(objects=[])))
getattr(os_vif, verb)(device, instance_info.InstanceInfo(
    uuid=port, name='guest'))
'''

_DHCP = '''#!/bin/sh
case $1 in
bound)
    ip addr add $ip/$mask dev $interface
    set -- $staticroutes
    while [ $# -ge 2 ]; do
        ip route add $1 via $2
        shift 2
    done
esac
'''


class ServicesTest(base.CloudTestCase):

    def test_processes(self):
        # Exit code 0 only if every process of the cloud is alive.
        base.cloud_sh('status')

    def test_nova_services(self):
        states = {(service.binary, service.host): service.state
                  for service in self.admin.compute.services()}
        for key in (('nova-scheduler', 'controller'),
                    ('nova-conductor', 'controller'),
                    ('nova-compute', 'host1'), ('nova-compute', 'host2')):
            self.assertEqual('up', states.get(key), key)

    def test_hypervisors(self):
        found = {hypervisor.name: hypervisor.state
                 for hypervisor in self.admin.compute.hypervisors()}
        for host in base.HOSTS:
            self.assertEqual('up', found.get(host))

    def test_network_agents(self):
        agents = [agent for agent in self.admin.network.agents()
                  if agent.host in base.HOSTS]
        self.assertEqual(4, len(agents))
        for agent in agents:
            self.assertTrue(agent.is_alive, agent)

    def test_resource_providers(self):
        names = {provider.name
                 for provider in self.admin.placement.resource_providers()}
        self.assertTrue(names.issuperset(base.HOSTS), names)

    def test_image_round_trip(self):
        data = b'some bytes' * 100_000
        image = self.demo.image.create_image(
            'round-trip', data=data, disk_format='raw',
            container_format='bare', allow_duplicates=True)
        self.addCleanup(self.demo.image.delete_image, image.id)
        self.assertEqual(data,
                         self.demo.image.download_image(image).content)

    def test_command_line(self):
        flavors = json.loads(self.cli('flavor', 'list', '-f', 'json'))
        self.assertTrue({'pyc.tiny', 'pyc.small', 'pyc.medium'}.issubset(
            {flavor['Name'] for flavor in flavors}))


class HostsTest(base.CloudTestCase):

    def test_compute_runs_without_privilege(self):
        for host in base.HOSTS:
            pid = self.service_pid(f'{host}.nova-compute')
            with open(f'/proc/{pid}/status') as status:
                fields = dict(line.split(':', 1) for line in status)
            self.assertNotIn('0', fields['Uid'].split())
            self.assertEqual(0, int(fields['CapEff'], 16))

    def test_cgroup_v2_only(self):
        for host in base.HOSTS:
            kind = self.on_host(host, 'stat', '-f', '-c', '%T',
                                '/sys/fs/cgroup')
            self.assertEqual('cgroup2fs', kind.strip())

    def test_own_network_devices(self):
        for host in base.HOSTS:
            self.assertIn('br-phy', self.on_host(host, 'ls',
                                                 '/sys/class/net'))

    def test_migration_network(self):
        self.on_host('host1', 'ping', '-c', '1', '-W', '5', '198.18.0.12')


class NetworkTest(base.CloudTestCase):
    """Guests that are bare network namespaces, plugged as Nova plugs."""

    def _guest(self, host: str) -> tuple[str, str]:
        """A guest with an address from DHCP; its name and its address."""
        project = self.admin.identity.find_project('demo')
        network = self.admin.network.find_network('private',
                                                  project_id=project.id)
        group = self.admin.network.find_security_group(
            'default', project_id=project.id)
        port = self.admin.network.create_port(
            network_id=network.id, project_id=project.id,
            name='guest', security_group_ids=[group.id],
            binding_host_id=host)
        self.addCleanup(self.admin.network.delete_port, port.id)
        guest = f'guest-{uuid.uuid4().hex[:8]}'
        device = f'tap{port.id[:11]}'
        mac = port.mac_address
        self.on_host(host, 'bash', '-euc', f'''
            ip netns add {guest}
            ip link add {device} type veth peer name {guest[:15]}
            ip link set {guest[:15]} netns {guest}
            ip -n {guest} link set {guest[:15]} name eth0 address {mac}
            ip -n {guest} link set eth0 mtu {network.mtu} up
            nsenter --net=/run/netns/{guest} ethtool -K eth0 tx off
            ip link set {device} mtu {network.mtu} up
        ''')
        self.addCleanup(self.on_host, host, 'ip', 'netns', 'del', guest)
        for verb in ('unplug', 'plug'):
            argv = ('setpriv', '--reuid=nova', '--regid=nova',
                    '--init-groups', str(base.WORK / 'venv/bin/python'),
                    '-c', _PLUG, verb, port.id, mac)
            if verb == 'plug':
                self.on_host(host, *argv)
            else:
                self.addCleanup(self.on_host, host, *argv)
        base.wait_for(
            lambda: self.admin.network.get_port(port.id).status == 'ACTIVE',
            60, f'port {port.id} is ACTIVE')
        script = f'/run/{guest}.sh'
        self.on_host(host, 'bash', '-euc',
                     f'cat >{script} <<"END"\n{_DHCP}END\n'
                     f'chmod 755 {script}')
        self._in(host, guest, 'busybox', 'udhcpc', '-i', 'eth0', '-n', '-q',
                 '-s', script)
        return guest, port.fixed_ips[0]['ip_address']

    def _in(self, host: str, guest: str, *argv: str) -> str:
        return self.on_host(host, 'nsenter', f'--net=/run/netns/{guest}',
                            *argv)

    def test_across_hosts(self):
        one, address1 = self._guest('host1')
        two, address2 = self._guest('host2')
        self.assertIn(address1, self._in('host1', one, 'ip', 'address'))
        self._in('host1', one, 'ping', '-c', '3', '-i', '0.3', address2)
        # The service answers, although it knows no such instance.
        answer = self._in('host1', one, 'curl', '-s', '-m', '20',
                          'http://169.254.169.254/')
        self.assertIn('Instance was not found', answer)
        # TCP with bulk data: what unfinished checksums or a wrong MTU break.
        # Ports but 22 are closed to the outside, not within the group.
        size = 2_000_000
        self._in('host2', two, 'bash', '-c',
                 'setsid timeout 60 nc -l -p 22 '
                 f'>/run/{two}.got 2>/dev/null </dev/null &')
        base.wait_for(
            lambda: ':22' in self._in('host2', two, 'ss', '-Hltn'), 20,
            'nc listens')
        self._in('host1', one, 'bash', '-c',
                 f'head -c {size} /dev/urandom | '
                 f'timeout 60 nc -q 1 {address2} 22')
        base.wait_for(
            lambda: int(self.on_host('host2', 'stat', '-c', '%s',
                                     f'/run/{two}.got')) == size,
            30, 'all bytes arrive')

    def test_floating_ip(self):
        for host in base.HOSTS:
            guest, address = self._guest(host)
            project = self.admin.identity.find_project('demo')
            public = self.admin.network.find_network('public')
            port = next(self.admin.network.ports(
                fixed_ips=f'ip_address={address}', project_id=project.id))
            floating = self.demo.network.create_ip(
                floating_network_id=public.id, port_id=port.id)
            self.addCleanup(self.demo.network.delete_ip, floating)

            def answers(address=floating.floating_ip_address):
                try:
                    return base.run(['ping', '-c', '1', '-W', '2', address])
                except base.CommandError:
                    return None

            base.wait_for(answers, 30, 'the floating IP answers')
            # And the way out, through the router.
            self._in(host, guest, 'ping', '-c', '2', '-i', '0.3',
                     '192.0.2.1')
