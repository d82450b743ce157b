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

"""Links and addresses of the hosts; Open vSwitch and OVN.

Underlay: a Linux bridge on the controller, a veth to each compute host. On a
compute host the uplink and the host's address sit on br-phy, an Open vSwitch
bridge, because tunnels of the userspace datapath need the tunnel address on
such a bridge. The userspace datapath needs no kernel module.

Checksum offload is off wherever a veth enters the userspace datapath: it
would pass packets with unfinished checksums (ping works, TCP hangs).
"""

import subprocess

from cloud import hosts
from cloud import layout
from cloud import process

SCHEMAS = '/usr/share/openvswitch'
OVN_SCHEMAS = '/usr/share/ovn'
OVN_DATA = layout.DATA / 'ovn'


def _ip(*args: str) -> None:
    done = subprocess.run(['ip', *args], capture_output=True, text=True)
    if done.returncode:
        raise process.CloudError(f'ip {" ".join(args)}: {done.stderr}')


def link_controller() -> None:
    address = layout.UNDERLAY[layout.CONTROLLER]
    pid = hosts.pid(layout.CONTROLLER)
    hosts.script(layout.CONTROLLER, f'''
        ip link add br-ul type bridge
        ip addr add {address}/24 dev br-ul
        ip link set br-ul up
        ip link add br-x type bridge
        ip addr add {layout.PUBLIC_GATEWAY}/24 dev br-x
        ip link set br-x up
        sysctl -qw net.ipv4.ip_forward=1
    ''')
    _ip('link', 'add', layout.OUTSIDE_LINK, 'type', 'veth', 'peer', 'name',
        'mgmt', 'netns', str(pid))
    _ip('addr', 'add', f'{layout.OUTSIDE}/24', 'dev', layout.OUTSIDE_LINK)
    _ip('link', 'set', layout.OUTSIDE_LINK, 'up')
    hosts.script(layout.CONTROLLER, f'''
        ip link set mgmt master br-ul up
        ip route add default via {layout.OUTSIDE}
    ''')
    # Floating IPs are reached from here through the controller.
    _ip('route', 'replace', layout.PUBLIC_CIDR, 'via', address, 'dev',
        layout.OUTSIDE_LINK)


def unlink_controller() -> None:
    subprocess.run(['ip', 'link', 'del', layout.OUTSIDE_LINK],
                   capture_output=True)


def link_compute(host: str) -> None:
    pid = hosts.pid(host)
    for bridge, outer, inner in (('br-ul', f'ul-{host}', 'uplink'),
                                 ('br-x', f'x-{host}', 'ext')):
        hosts.script(layout.CONTROLLER, f'''
            ip link add {outer} type veth peer name {inner} netns {pid}
            ethtool -K {outer} tx off >/dev/null
            ip link set {outer} master {bridge} up
        ''')
        hosts.script(host, f'''
            ethtool -K {inner} tx off >/dev/null
            ip link set {inner} up
        ''')


def link_migration() -> None:
    one, two = layout.COMPUTES
    hosts.script(one, f'ip link add mig0 type veth peer name mig0 '
                      f'netns {hosts.pid(two)}')
    for host in layout.COMPUTES:
        hosts.script(host, f'''
            ip addr add {layout.MIGRATION[host]}/24 dev mig0
            ip link set mig0 up
        ''')


def _start_ovsdb(host: str, chassis: str, address: str,
                 **more: str) -> None:
    """The database of Open vSwitch, with the settings of ovn-controller."""
    name = f'{chassis}.ovsdb-server'
    if not process.alive(name):
        hosts.script(host, f'''
            mkdir -p /etc/openvswitch /run/openvswitch
            rm -f /etc/openvswitch/conf.db
            ovsdb-tool create /etc/openvswitch/conf.db \
                {SCHEMAS}/vswitch.ovsschema
        ''')
        process.spawn(name, hosts.enter(host, [
            'ovsdb-server', '/etc/openvswitch/conf.db',
            '--remote=punix:/run/openvswitch/db.sock',
            '--remote=ptcp:6640:127.0.0.1',
            '--pidfile=/run/openvswitch/ovsdb-server.pid',
            '-vconsole:info', '-vsyslog:off']), host)
    sock = hosts.root(host) / 'run/openvswitch/db.sock'
    process.wait_ready(name, sock.exists, timeout=20, interval=0.05)
    settings = {
        'system-id': chassis, 'hostname': chassis,
        'ovn-remote': f'tcp:{layout.API}:{layout.PORTS["ovn-sb"]}',
        'ovn-encap-type': 'geneve', 'ovn-encap-ip': address,
        'ovn-bridge': 'br-int', 'ovn-bridge-datapath-type': 'netdev',
        'ovn-remote-probe-interval': '30000',
        **{key.replace('_', '-'): value for key, value in more.items()}}
    values = ' '.join(f"external_ids:{key}='\"{value}\"'"
                      for key, value in settings.items())
    hosts.script(host, f'''
        ovs-vsctl --no-wait init
        ovs-vsctl --no-wait set Open_vSwitch . {values}
    ''')
    name = f'{chassis}.ovs-vswitchd'
    if not process.alive(name):
        process.spawn(name, hosts.enter(host, [
            'ovs-vswitchd', 'unix:/run/openvswitch/db.sock',
            '--pidfile=/run/openvswitch/ovs-vswitchd.pid',
            # Started again after a crash, as packages do: its userspace
            # connection tracking (3.1) has died of an assertion.
            '--monitor',
            '-vconsole:info', '-vsyslog:off']), host)


def start_ovs(host: str) -> None:
    """Open vSwitch with its bridges; the host's way into the underlay.

    Without checks of TCP sequence numbers: a server that comes back to a host
    finds entries of its connections in that host's tracking, with the numbers
    of the time when it left, and the router's translation would drop what
    does not fit them. A kernel datapath has nf_conntrack_tcp_be_liberal.
    """
    address = layout.UNDERLAY[host]
    _start_ovsdb(host, host, address, ovn_bridge_mappings='public:br-ex',
                 ovn_cms_options='enable-chassis-as-gw')
    hosts.script(host, f'''
        ovs-vsctl --timeout=20 --may-exist add-br br-phy \
            -- set bridge br-phy datapath_type=netdev fail_mode=standalone \
            -- --may-exist add-port br-phy uplink \
            -- --may-exist add-br br-ex \
            -- set bridge br-ex datapath_type=netdev fail_mode=standalone \
            -- --may-exist add-port br-ex ext \
            -- --may-exist add-br br-int \
            -- set bridge br-int datapath_type=netdev fail_mode=secure
        ovs-appctl dpctl/ct-disable-tcp-seq-chk
        ip addr replace {address}/24 dev br-phy
        ip link set br-phy up
        ip link set br-ex up
        ip route replace default via {layout.OUTSIDE}
    ''')


def start_ovn_central() -> None:
    """The northbound and southbound databases."""
    OVN_DATA.mkdir(parents=True, exist_ok=True)
    for part in ('nb', 'sb'):
        name = f'ovn-{part}'
        if process.alive(name):
            continue
        database = OVN_DATA / f'ovn{part}.db'
        if not database.exists():
            hosts.run(layout.CONTROLLER, [
                'ovsdb-tool', 'create', str(database),
                f'{OVN_SCHEMAS}/ovn-{part}.ovsschema'])
        port = layout.PORTS[name]
        process.spawn(name, hosts.enter(layout.CONTROLLER, [
            'ovsdb-server', str(database),
            f'--remote=punix:/run/ovn/ovn{part}_db.sock',
            f'--remote=ptcp:{port}:{layout.API}',
            f'--pidfile=/run/ovn/ovn{part}_db.pid',
            f'--unixctl=/run/ovn/ovn{part}_db.ctl',
            '-vconsole:info', '-vsyslog:off']), layout.CONTROLLER)
    for part in ('nb', 'sb'):
        sock = (hosts.root(layout.CONTROLLER) /
                f'run/ovn/ovn{part}_db.sock')
        process.wait_ready(f'ovn-{part}', sock.exists, timeout=20,
                           interval=0.05)
    hosts.run(layout.CONTROLLER, [
        'ovn-nbctl', '--timeout=10', '--no-leader-only',
        '--db=unix:/run/ovn/ovnnb_db.sock', 'init'])
    hosts.run(layout.CONTROLLER, [
        'ovn-sbctl', '--timeout=10', '--no-leader-only',
        '--db=unix:/run/ovn/ovnsb_db.sock', 'init'])
    if not process.alive('ovn-northd'):
        process.spawn('ovn-northd', hosts.enter(layout.CONTROLLER, [
            'ovn-northd', '--ovnnb-db=unix:/run/ovn/ovnnb_db.sock',
            '--ovnsb-db=unix:/run/ovn/ovnsb_db.sock',
            '--pidfile=/run/ovn/ovn-northd.pid',
            '-vconsole:info', '-vsyslog:off']), layout.CONTROLLER)


def start_ovn_controller(host: str, chassis: str | None = None) -> None:
    chassis = chassis or host
    name = f'{chassis}.ovn-controller'
    if not process.alive(name):
        process.spawn(name, hosts.enter(host, [
            'ovn-controller', 'unix:/run/openvswitch/db.sock',
            '--pidfile=/run/ovn/ovn-controller.pid',
            '-vconsole:info', '-vsyslog:off']), host)

    def connected() -> bool:
        done = subprocess.run(
            hosts.enter(layout.CONTROLLER, [
                'ovn-sbctl', '--timeout=5', '--no-leader-only', '--bare',
                '--db=unix:/run/ovn/ovnsb_db.sock', '--columns=name',
                'find', 'chassis', f'name={chassis}']),
            capture_output=True, text=True)
        return chassis in done.stdout

    process.wait_ready(name, connected, timeout=30)


def start_fake_chassis() -> None:
    """A chassis for the fake host: without one Neutron binds no port."""
    host, chassis = layout.CONTROLLER, layout.FAKE_HOST
    _start_ovsdb(host, chassis, layout.UNDERLAY[host])
    start_ovn_controller(host, chassis)


def stop_fake_chassis() -> None:
    chassis = layout.FAKE_HOST
    process.stop(f'{chassis}.{name}' for name in (
        'ovn-controller', 'ovs-vswitchd', 'ovsdb-server'))
    hosts.script(layout.CONTROLLER, f'''
        rm -f /etc/openvswitch/conf.db
        ovn-sbctl --timeout=10 --no-leader-only \
            --db=unix:/run/ovn/ovnsb_db.sock --if-exists \
            chassis-del {chassis} -- --if-exists \
            destroy chassis_private {chassis}
    ''')
