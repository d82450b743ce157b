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

"""What Neutron promises of a server's ports, seen in the packets."""

import base64
import json
import socket
import time
import typing

from tests import cases
from tests.cloud import base

PATIENCE = 60


class NetworksTest(base.CloudTestCase):

    def _migrate(self, server: typing.Any) -> None:
        before = self.host_of(server)
        self.cli('server', 'migrate', '--live-migration', '--wait',
                 server.id, user='admin')
        self.assertNotEqual(before, self.host_of(server))
        self.wait_server(server.id, 'ACTIVE')

    def _port(self, server: typing.Any) -> typing.Any:
        return next(self.admin.network.ports(device_id=server.id))

    def _answers(self, server: typing.Any, address: str,
                 command: str = 'ping -c 1 -W 2') -> bool:
        try:
            self.inside(server, f'{command} {address}')
            return True
        except base.CommandError:
            return False

    def _settles(self, wanted: bool, call: typing.Callable[[], bool],
                 what: str) -> None:
        """Until something is so, and is so again: rules take a moment."""
        base.wait_for(lambda: call() is wanted, PATIENCE, what)
        self.assertIs(wanted, call(), what)

    def _network(self, name: str, *subnets: dict[str, object]) -> typing.Any:
        """A network of the demo project, removed with its router."""
        api = self.demo.network
        network = api.create_network(name=name)
        self.addCleanup(api.delete_network, network)
        router = api.create_router(name=name)
        self.addCleanup(api.delete_router, router)
        for values in subnets:
            subnet = api.create_subnet(network_id=network.id, **values)
            self.addCleanup(api.delete_subnet, subnet)
            api.add_interface_to_router(router, subnet_id=subnet.id)
            self.addCleanup(api.remove_interface_from_router, router,
                            subnet_id=subnet.id)
        return network

    def test_security_group(self):
        """What no rule permits does not arrive, on either host."""
        server = self.create_server('busybox', 'pyc.tiny')
        address = self.floating_ip(server)
        group = self.demo.network.find_security_group('default')

        def web() -> bool:
            try:
                socket.create_connection((address, 80), timeout=3).close()
                return True
            except OSError:
                return False

        # It answers, and the default group lets nobody outside ask.
        self.inside(server, 'wget -q -O /dev/null http://127.0.0.1/ || '
                    'nc -z 127.0.0.1 80')
        seen = "awk '$1 == \"Tcp:\" && $6 ~ /^[0-9]/ {print $7}' " \
               '/proc/net/snmp'
        self._settles(False, web, 'closed')
        before = self.inside(server, seen)
        self.assertFalse(web())
        self.assertEqual(before, self.inside(server, seen))
        rule = self.demo.network.create_security_group_rule(
            security_group_id=group.id, direction='ingress',
            ether_type='IPv4', protocol='tcp', port_range_min=80,
            port_range_max=80, remote_ip_prefix='0.0.0.0/0')
        self.addCleanup(
            self.demo.network.delete_security_group_rule, rule)
        self._settles(True, web, 'open')
        self._migrate(server)
        self._settles(True, web, 'open on the other host')
        self.demo.network.delete_security_group_rule(rule)
        self._settles(False, web, 'closed again')

    @cases.more
    def test_allowed_address_pairs(self):
        """Another address is heard when its port has been given it."""
        one = self.create_server('busybox', 'pyc.tiny', host='host1')
        two = self.create_server('busybox', 'pyc.tiny', host='host2')
        network = self.admin.network.get_network(
            self._port(one).network_id)
        spare = self.admin.network.create_port(
            network_id=network.id, project_id=network.project_id)
        self.addCleanup(self.admin.network.delete_port, spare)
        address = spare.fixed_ips[0]['ip_address']
        self.inside(one, f'ip address add {address}/32 dev eth0')
        self._settles(True, lambda: self._answers(two, self.fixed_ip(one)),
                      'its own address')
        self._settles(False, lambda: self._answers(two, address),
                      'an address of nobody')
        self.admin.network.update_port(
            self._port(one), allowed_address_pairs=[{'ip_address': address}])
        self._settles(True, lambda: self._answers(two, address),
                      'an address that is allowed')
        self._migrate(one)
        self._settles(True, lambda: self._answers(two, address),
                      'an address that is allowed, after a move')

    def test_ipv6(self):
        """Addresses of both families, by router advertisements and DHCP."""
        network = self._network(
            'dual', {'ip_version': 4, 'cidr': '10.66.0.0/24'},
            {'ip_version': 6, 'cidr': 'fd66::/64',
             'ipv6_ra_mode': 'slaac', 'ipv6_address_mode': 'slaac'})
        servers = [self.create_server(
            'busybox', 'pyc.tiny', host=host,
            networks=[{'uuid': network.id}]) for host in base.HOSTS]
        addresses = [{
            6 if ':' in found['ip_address'] else 4: found['ip_address']
            for found in self._port(server).fixed_ips} for server in servers]
        one, two = servers

        for server, its in zip(servers, addresses, strict=True):
            for address in its.values():
                base.wait_for(
                    lambda server=server, address=address: address in
                    self.inside(server, 'ip address show eth0'),
                    PATIENCE, f'{address} in the guest')
        for moved in (False, True):
            if moved:
                self._migrate(one)
                self._migrate(two)
            for family, command in ((4, 'ping'), (6, 'ping6')):
                self._settles(
                    True, lambda family=family, command=command:
                    self._answers(one, addresses[1][family],
                                  f'{command} -c 1 -W 2'),
                    f'the other server by IPv{family}')
            self.assertIn('default via fe80:', self.inside(
                one, 'ip -6 route'))

    @cases.more
    def test_bandwidth_limit(self):
        """A policy of the port's holds on both hosts."""
        api = self.admin.network
        policy = api.create_qos_policy(name='slow', shared=True)
        self.addCleanup(api.delete_qos_policy, policy)
        api.create_qos_bandwidth_limit_rule(
            policy, max_kbps=1000, max_burst_kbps=100, direction='egress')
        server = self.create_server('busybox', 'pyc.tiny')
        address = self.floating_ip(server)
        self.open_port(5000)

        def seconds() -> float:
            """For a megabyte; no limit would be noticed without it."""
            self.inside(
                server, "setsid sh -c 'dd if=/dev/zero bs=1000 count=1000 "
                "2>/dev/null | nc -l -p 5000' </dev/null >/dev/null 2>&1 & "
                'until netstat -ltn | grep -q :5000; do sleep 0.1; done')
            began, count = time.monotonic(), 0
            with socket.create_connection((address, 5000), 30) as peer:
                while count < 1_000_000:
                    got = peer.recv(65536)
                    self.assertTrue(got, f'it ended after {count} bytes')
                    count += len(got)
            return time.monotonic() - began

        self._settles(True, lambda: self._answers(server, '127.0.0.1'), 'up')
        api.update_port(self._port(server), qos_policy_id=policy.id)
        # Eight megabits at one a second, less what may burst.
        base.wait_for(lambda: seconds() > 5, PATIENCE, 'the limit')
        self._migrate(server)
        base.wait_for(lambda: seconds() > 5, PATIENCE,
                      'the limit on the other host')

    @cases.more
    def test_trunk(self):
        """Frames with the tag of a subport are its network's.

        This machine's kernel has no devices for VLANs: the guest's frames are
        written as such a device would.
        """
        api = self.demo.network
        parent = self._network(
            'parent', {'ip_version': 4, 'cidr': '10.77.0.0/24'})
        child = self._network(
            'child', {'ip_version': 4, 'cidr': '10.78.0.0/24'})
        ports = []
        for network in (parent, child):
            ports.append(api.create_port(network_id=network.id))
            self.addCleanup(api.delete_port, ports[-1])
        trunk = api.create_trunk(port_id=ports[0].id, sub_ports=[{
            'port_id': ports[1].id, 'segmentation_type': 'vlan',
            'segmentation_id': 78}])
        self.addCleanup(api.delete_trunk, trunk)
        server = self.create_server(
            'busybox', 'pyc.tiny', networks=[{'port': ports[0].id}])

        def asked(tag: int) -> bool:
            return bool(self._who_has(
                server, tag, ports[1].mac_address,
                ports[1].fixed_ips[0]['ip_address'], '10.78.0.1'))

        for moved in (False, True):
            if moved:
                self._migrate(server)
            self._settles(True, lambda: asked(78), "the subport's network")
            self.assertFalse(asked(79))
        self.assertEqual('ACTIVE', api.get_port(ports[1]).status)

    def _who_has(self, server: typing.Any, tag: int, mac: str, address: str,
                 wanted: str) -> str:
        """Ask by ARP from inside a server's network namespace."""
        script = base64.b64encode(_ARP.encode()).decode()
        pid = self.container(server)['pid']
        return self.on_host(
            self.host_of(server), 'nsenter', '-t', str(pid), '-n',
            'python3', '-c', f'import base64; exec(base64.b64decode("{script}"'
            '))', json.dumps([tag, mac, address, wanted])).strip()


#: Prints the address that has answered a tagged request, or nothing.
_ARP = """
import json, socket, struct, sys, time
tag, mac, address, wanted = json.loads(sys.argv[1])
mac = bytes.fromhex(mac.replace(':', ''))
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(('eth0', 0))
s.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA
s.settimeout(0.5)
frame = (b'\\xff' * 6 + mac + struct.pack('!HHHHHBBH', 0x8100, tag, 0x0806,
         1, 0x0800, 6, 4, 1) + mac + socket.inet_aton(address) + bytes(6) +
         socket.inet_aton(wanted))
end = time.monotonic() + 3
while time.monotonic() < end:
    s.send(frame)
    try:
        data, auxiliary, *_ = s.recvmsg(2048, 256)
    except TimeoutError:
        continue
    found = [struct.unpack('IIIHHHH', value)[5] & 0xfff
             for _, kind, value in auxiliary if kind == 8]
    if data[12:14] == b'\\x81\\x00':
        found = [int.from_bytes(data[14:16], 'big') & 0xfff]
        data = data[:12] + data[16:]
    if (found == [tag] and data[12:14] == b'\\x08\\x06' and
            data[20:22] == b'\\x00\\x02' and
            data[28:32] == socket.inet_aton(wanted)):
        print(wanted)
        break
"""
