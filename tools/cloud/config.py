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

"""Configuration files of all services, generated."""

import configparser
import io

from cloud import hosts
from cloud import layout

#: Configuration of the two drivers that the compute hosts can run with.
DRIVERS = {'pycontainer': 'pycontainer.PyContainerDriver',
           'fake': 'fake.FakeDriver'}

Sections = dict[str, dict[str, object]]


def render(sections: Sections) -> str:
    parser = configparser.RawConfigParser(default_section='\0',
                                          comment_prefixes=('#',))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    for name, values in sections.items():
        parser[name] = {key: str(value) for key, value in values.items()}
    out = io.StringIO()
    parser.write(out)
    return out.getvalue()


def database(name: str) -> str:
    return (f'mysql+pymysql://openstack:{layout.secret("database")}@'
            f'{layout.API}/{name}?charset=utf8mb4')


def transport() -> str:
    return (f'rabbit://openstack:{layout.secret("rabbit")}@{layout.API}:'
            f'{layout.PORTS["rabbitmq"]}/')


def memcached() -> str:
    return f'{layout.API}:{layout.PORTS["memcached"]}'


def auth(user: str) -> dict[str, object]:
    """How a service logs in at Keystone."""
    return {'auth_type': 'password', 'auth_url': layout.URLS['identity'],
            'username': user, 'password': layout.secret('service'),
            'project_name': 'service', 'user_domain_name': 'Default',
            'project_domain_name': 'Default',
            'region_name': layout.REGION}


def auth_token(user: str) -> dict[str, object]:
    """How a service checks the tokens that it is given."""
    return {**auth(user), 'www_authenticate_uri': layout.URLS['identity'],
            'memcached_servers': memcached(),
            'service_token_roles_required': 'true',
            'service_token_roles': 'service'}


def _database(name: str) -> dict[str, object]:
    return {'connection': database(name), 'max_pool_size': 5,
            'max_overflow': 20, 'connection_recycle_time': 280}


def keystone() -> Sections:
    return {
        'DEFAULT': {'debug': 'false', 'max_token_size': 255},
        'database': _database('keystone'),
        # Without a cache the check of a token takes two seconds.
        'cache': {'enabled': 'true', 'backend': 'oslo_cache.memcache_pool',
                  'memcache_servers': memcached()},
        # This is a test cloud: cheap password hashes.
        'identity': {'password_hash_rounds': 4},
        'token': {'provider': 'fernet', 'expiration': 86400},
        'fernet_tokens': {'key_repository': '/etc/keystone/fernet-keys'},
        'credential': {'key_repository': '/etc/keystone/credential-keys'},
    }


def glance() -> Sections:
    return {
        'DEFAULT': {'enabled_backends': 'file:file',
                    'bind_host': layout.API,
                    'worker_self_reference_url': layout.URLS['image'],
                    'show_multiple_locations': 'false',
                    'node_staging_uri': 'file:///var/lib/glance/staging'},
        'database': _database('glance'),
        'glance_store': {'default_backend': 'file'},
        'file': {'filesystem_store_datadir': '/var/lib/glance/images'},
        'os_glance_staging_store': {
            'filesystem_store_datadir': '/var/lib/glance/staging'},
        'os_glance_tasks_store': {
            'filesystem_store_datadir': '/var/lib/glance/tasks'},
        'keystone_authtoken': auth_token('glance'),
        'paste_deploy': {
            'flavor': 'keystone',
            'config_file': str(layout.VENV /
                               'etc/glance/glance-api-paste.ini')},
        'oslo_concurrency': {'lock_path': '/var/lib/glance/lock'},
    }


def placement() -> Sections:
    return {
        'placement_database': _database('placement'),
        'api': {'auth_strategy': 'keystone'},
        'keystone_authtoken': auth_token('placement'),
        'placement': {'randomize_allocation_candidates': 'true'},
    }


def neutron() -> Sections:
    return {
        'DEFAULT': {'core_plugin': 'ml2',
                    'service_plugins': 'ovn-router,qos,trunk',
                    'transport_url': transport(),
                    'auth_strategy': 'keystone',
                    'state_path': '/var/lib/neutron',
                    'api_paste_config': str(
                        layout.VENV / 'etc/neutron/api-paste.ini'),
                    'notify_nova_on_port_status_changes': 'true',
                    'notify_nova_on_port_data_changes': 'true',
                    'api_workers': 2, 'rpc_workers': 0,
                    'dns_domain': 'cloud.test.'},
        'database': _database('neutron'),
        'keystone_authtoken': auth_token('neutron'),
        'nova': auth('nova'),
        'placement': auth('placement'),
        'oslo_concurrency': {'lock_path': '/var/lib/neutron/lock'},
        'oslo_messaging_notifications': {'driver': 'noop'},
        'quotas': {f'quota_{what}': -1 for what in (
            'network', 'subnet', 'port', 'router', 'floatingip',
            'security_group', 'security_group_rule')},
    }


def _ovn() -> dict[str, object]:
    return {'ovn_nb_connection':
            f'tcp:{layout.API}:{layout.PORTS["ovn-nb"]}',
            'ovn_sb_connection':
            f'tcp:{layout.API}:{layout.PORTS["ovn-sb"]}',
            'ovn_metadata_enabled': 'true',
            # Where a port has moved to, ovn-controller 23.03 now and then
            # leaves out the flows of a distributed floating IP until it is
            # told to recompute.
            'enable_distributed_floating_ip': 'false'}


def ml2() -> Sections:
    return {
        'ml2': {'type_drivers': 'geneve,flat', 'mechanism_drivers': 'ovn',
                'tenant_network_types': 'geneve',
                'extension_drivers': 'port_security,qos',
                'overlay_ip_version': 4},
        'ml2_type_geneve': {'vni_ranges': '1:65535', 'max_header_size': 38},
        'ml2_type_flat': {'flat_networks': 'public'},
        'securitygroup': {'enable_security_group': 'true'},
        'ovn': _ovn(),
    }


def metadata_agent() -> Sections:
    return {
        'DEFAULT': {'nova_metadata_host': layout.API,
                    'nova_metadata_port': layout.PORTS['nova-metadata'],
                    'metadata_proxy_shared_secret': layout.secret('metadata'),
                    'metadata_workers': 0,
                    'state_path': '/var/lib/neutron'},
        # The agent is root on its host and needs no helper for that.
        'agent': {'root_helper': 'env'},
        'ovs': {'ovsdb_connection': 'tcp:127.0.0.1:6640'},
        'ovn': _ovn(),
        'oslo_concurrency': {'lock_path': '/var/lib/neutron/lock'},
    }


def privsep_helper(config: str) -> str:
    return f'sudo -n {layout.VENV}/bin/privsep-helper --config-file {config}'


def pycontainer(host: str) -> dict[str, object]:
    """The [pycontainer] group, the same for the agent and the driver."""
    return {'state_dir': '/var/lib/pycontainer',
            'run_dir': '/run/pycontainer',
            'agent_socket': '/run/pycontainer/agent.sock',
            'agent_group': layout.USER,
            'oci_runtime_path': str(layout.PREFIX / 'bin/crun'),
            'criu_path': str(layout.PREFIX / 'bin/criu'),
            'cgroup_parent': layout.CGROUP_PARENT.format(host=host),
            'console_listen': layout.UNDERLAY[host],
            'migration_address': layout.MIGRATION[host]}


def nova(host: str, service: str, address: str,
         driver: str | None = None) -> Sections:
    """nova.conf of the controller's services or of one compute service.

    :param host: the service's name
    :param service: ``control`` or ``compute``
    :param address: the host's own address
    :param driver: the value of compute_driver
    """
    config = '/etc/nova/nova.conf'
    sections: Sections = {
        'DEFAULT': {'host': host, 'my_ip': address,
                    'transport_url': transport(),
                    'state_path': '/var/lib/nova',
                    'log_options': 'false',
                    'resume_guests_state_on_host_boot': 'true',
                    'initial_cpu_allocation_ratio': 64.0,
                    'initial_ram_allocation_ratio': 4.0,
                    'initial_disk_allocation_ratio': 10.0,
                    # A dead service is noticed sooner than by default.
                    'report_interval': 4, 'service_down_time': 24,
                    'osapi_compute_workers': 2, 'metadata_workers': 1},
        'api': {'auth_strategy': 'keystone'},
        'cache': {'enabled': 'true', 'backend': 'oslo_cache.memcache_pool',
                  'memcache_servers': memcached()},
        'keystone_authtoken': auth_token('nova'),
        'service_user': {**auth('nova'), 'send_service_user_token': 'true'},
        'placement': auth('placement'),
        'glance': {'region_name': layout.REGION},
        'neutron': {**auth('neutron'),
                    'service_metadata_proxy': 'true',
                    'metadata_proxy_shared_secret':
                    layout.secret('metadata')},
        'oslo_concurrency': {'lock_path': '/var/lib/nova/lock'},
        'vnc': {'enabled': 'false'},
        'serial_console': {
            'enabled': 'true',
            'base_url': f'ws://{layout.API}:{layout.PORTS["serialproxy"]}/',
            'serialproxy_host': layout.API,
            'serialproxy_port': layout.PORTS['serialproxy'],
            'proxyclient_address': address},
        'quota': {'instances': -1, 'cores': -1, 'ram': -1,
                  'server_groups': -1, 'key_pairs': -1},
    }
    if service == 'control':
        sections['database'] = _database('nova_cell1')
        sections['api_database'] = _database('nova_api')
        sections['scheduler'] = {'workers': 1,
                                 'discover_hosts_in_cells_interval': 30}
        sections['conductor'] = {'workers': 1}
        # What needs the trait of an aggregate lands there and nothing else
        # does: so the fake host takes no servers but its own.
        sections['scheduler'][
            'enable_isolated_aggregate_filtering'] = 'true'
        sections['filter_scheduler'] = {'track_instance_changes': 'true'}
    else:
        sections['DEFAULT']['compute_driver'] = driver
        sections['DEFAULT']['instances_path'] = '/var/lib/nova/instances'
        for context in ('vif_plug_ovs_privileged', 'privsep_osbrick',
                        'nova_sys_admin'):
            sections[context] = {'helper_command': privsep_helper(config)}
        if host in layout.COMPUTES:
            sections['pycontainer'] = pycontainer(host)
    return sections


def sudoers() -> str:
    """What nova-compute may start as root: os-vif's and os-brick's helpers.

    The driver itself needs none: its privileged half is the agent.
    """
    lines = [f'Defaults:{layout.USER} !requiretty, !pam_session']
    for context in ('vif_plug_ovs.privsep.vif_plug',
                    'os_brick.privileged.default'):
        lines.append(
            f'{layout.USER} ALL=(root) NOPASSWD: '
            f'{layout.VENV}/bin/privsep-helper '
            f'--config-file /etc/nova/nova.conf '
            f'--privsep_context {context} --privsep_sock_path *')
    return '\n'.join(lines) + '\n'


def uwsgi(module: str, port: int, processes: int) -> str:
    values = {
        'module': module, 'http-socket': f'{layout.API}:{port}',
        'processes': processes, 'threads': 1, 'master': 'true',
        'enable-threads': 'true', 'lazy-apps': 'true', 'need-app': 'true',
        'die-on-term': 'true', 'thunder-lock': 'true',
        'buffer-size': 65535, 'add-header': 'Connection: close',
        'http-chunked-input': 'true', 'worker-reload-mercy': 5,
        # Seconds. Who uploads a snapshot on a busy host pauses longer than
        # the four that are the default.
        'chunked-input-timeout': 60,
        # Neutron's workers agree by it on who is new.
        'start-time': '%t',
        # The services log their requests themselves.
        'disable-logging': 'true'}
    return '[uwsgi]\n' + ''.join(
        f'{key} = {value}\n' for key, value in values.items())


def write_controller() -> None:
    """All of the controller's files in its own /etc."""
    host, user = layout.CONTROLLER, layout.USER
    address = layout.UNDERLAY[host]
    paste = (layout.VENV / 'etc/nova/api-paste.ini').read_text()
    for path, sections in (
            ('/etc/keystone/keystone.conf', keystone()),
            ('/etc/glance/glance-api.conf', glance()),
            ('/etc/placement/placement.conf', placement()),
            ('/etc/neutron/neutron.conf', neutron()),
            ('/etc/neutron/ml2_conf.ini', ml2()),
            ('/etc/nova/nova.conf', nova(host, 'control', address))):
        hosts.make_dir(host, path.rpartition('/')[0])
        hosts.write(host, path, render(sections), 0o640, user)
    hosts.write(host, '/etc/nova/api-paste.ini', paste)
    hosts.make_dir(host, '/etc/uwsgi')
    for name, module, processes in (
            ('keystone', 'keystone.wsgi.api:application', 2),
            ('glance', 'glance.wsgi.api:application', 2),
            ('placement', 'placement.wsgi.api:application', 2),
            ('neutron', 'neutron.wsgi.api:application', 2),
            ('nova-api', 'nova.wsgi.osapi_compute:application', 2),
            ('nova-metadata', 'nova.wsgi.metadata:application', 1)):
        hosts.write(host, f'/etc/uwsgi/{name}.ini',
                    uwsgi(module, layout.PORTS[name], processes))
    for path in ('keystone', 'placement', 'neutron'):
        hosts.make_dir(host, f'/var/lib/{path}', owner=user)


def write_compute(host: str, driver: str) -> None:
    """The files of nova-compute, the agent and the metadata agent."""
    sections = nova(host, 'compute', layout.UNDERLAY[host], DRIVERS[driver])
    hosts.make_dir(host, '/etc/nova')
    hosts.write(host, '/etc/nova/nova.conf', render(sections), 0o640,
                layout.USER)
    hosts.make_dir(host, '/etc/pycontainer')
    hosts.write(host, '/etc/pycontainer/agent.conf', render(
        {'DEFAULT': {'host': host}, 'pycontainer': pycontainer(host)}))
    hosts.make_dir(host, '/etc/neutron')
    hosts.write(host, '/etc/neutron/neutron_ovn_metadata_agent.ini',
                render(metadata_agent()), 0o640)
    hosts.make_dir(host, '/var/lib/neutron')
    hosts.make_dir(host, '/etc/sudoers.d', 0o750)
    hosts.write(host, '/etc/sudoers.d/nova-compute', sudoers(), 0o440)
