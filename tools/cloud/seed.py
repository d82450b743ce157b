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

"""What the cloud holds after ``up``: users, endpoints, flavors, networks.

Everything is looked for before it is made, so that it can run again.
"""

import datetime
import pathlib
import subprocess
import time
import typing

from keystoneauth1 import exceptions as auth_exceptions
import openstack

from cloud import layout
from cloud import process

SERVICES = (('nova', 'compute'), ('glance', 'image'),
            ('placement', 'placement'), ('neutron', 'network'))
#: name: vCPUs, memory in MiB, disk in GB
FLAVORS = {'pyc.tiny': (1, 256, 2), 'pyc.small': (1, 512, 4),
           'pyc.medium': (2, 1024, 8)}
DEMO_KEY = layout.CLOUD / 'keys' / 'demo'


def connect(user: str = 'admin',
            project: str = 'admin') -> openstack.connection.Connection:
    rc = layout.openrc(user, project)
    return openstack.connect(
        load_yaml_config=False, load_envvars=False,
        region_name=layout.REGION, app_name='cloud.sh',
        compute_api_version='2.96',
        auth={'auth_url': rc['OS_AUTH_URL'], 'username': user,
              'password': rc['OS_PASSWORD'], 'project_name': project,
              'user_domain_name': 'Default',
              'project_domain_name': 'Default'})


def _ensure(found: typing.Any, make: typing.Callable[[], typing.Any]) -> (
        typing.Any):
    return found if found is not None else make()


def identity() -> None:
    """Service users, endpoints, and the demo project with its user."""
    cloud = connect()
    keystone = cloud.identity
    domain = 'default'
    projects = {
        name: _ensure(
            keystone.find_project(name, domain_id=domain),
            lambda name=name: keystone.create_project(
                name=name, domain_id=domain))
        for name in ('service', 'demo')}
    roles = {role.name: role for role in keystone.roles()}
    if 'service' not in roles:
        roles['service'] = keystone.create_role(name='service')
    users = {user.name: user for user in keystone.users(domain_id=domain)}
    wanted = [(name, layout.secret('service'), 'service',
               ('admin', 'service')) for name, _ in SERVICES]
    wanted.append(('demo', layout.secret('demo'), 'demo', ('member',)))
    for name, password, project, names in wanted:
        if name not in users:
            users[name] = keystone.create_user(
                name=name, password=password, domain_id=domain,
                default_project_id=projects[project].id)
        for role in names:
            keystone.assign_project_role_to_user(
                projects[project], users[name], roles[role])
    existing = {service.type: service for service in keystone.services()}
    endpoints = {(point.service_id, point.interface)
                 for point in keystone.endpoints()}
    for name, kind in SERVICES:
        service = existing.get(kind) or keystone.create_service(
            name=name, type=kind)
        for interface in ('public', 'internal', 'admin'):
            if (service.id, interface) not in endpoints:
                keystone.create_endpoint(
                    service_id=service.id, interface=interface,
                    url=layout.URLS[kind], region_id=layout.REGION)


def flavors() -> None:
    compute = connect().compute
    existing = {flavor.name for flavor in compute.flavors(details=False)}
    for name, (vcpus, ram, disk) in FLAVORS.items():
        if name not in existing:
            compute.create_flavor(name=name, vcpus=vcpus, ram=ram, disk=disk)


def networks() -> None:
    """External network; the demo project's network, router and rules."""
    admin = connect()
    network = admin.network
    public = network.find_network('public') or network.create_network(
        name='public', provider_network_type='flat',
        provider_physical_network='public', is_router_external=True,
        is_default=True)
    if network.find_subnet('public') is None:
        network.create_subnet(
            name='public', network_id=public.id, ip_version=4,
            cidr=layout.PUBLIC_CIDR, gateway_ip=layout.PUBLIC_GATEWAY,
            is_dhcp_enabled=False, allocation_pools=[
                {'start': layout.PUBLIC_POOL[0],
                 'end': layout.PUBLIC_POOL[1]}])
    if network.find_subnet_pool('default') is None:
        # Auto-allocation of topologies wants one.
        network.create_subnet_pool(
            name='default', prefixes=['10.64.0.0/12'],
            default_prefix_length=26, is_shared=True, is_default=True)
    demo = connect('demo', 'demo').network
    mine = admin.identity.find_project('demo').id
    private = (demo.find_network('private', project_id=mine) or
               demo.create_network(name='private'))
    subnet = (demo.find_subnet('private', project_id=mine) or
              demo.create_subnet(name='private', network_id=private.id,
                                 ip_version=4, cidr=layout.PRIVATE_CIDR))
    router = demo.find_router('router', project_id=mine)
    if router is None:
        router = demo.create_router(
            name='router', external_gateway_info={'network_id': public.id})
        demo.add_interface_to_router(router, subnet_id=subnet.id)
    group = demo.find_security_group('default', project_id=mine)
    rules = {(rule.protocol, rule.port_range_min)
             for rule in demo.security_group_rules(
                 security_group_id=group.id, direction='ingress')}
    for protocol, port in (('icmp', None), ('tcp', 22)):
        if (protocol, port) not in rules:
            demo.create_security_group_rule(
                security_group_id=group.id, direction='ingress',
                ether_type='IPv4', protocol=protocol, port_range_min=port,
                port_range_max=port, remote_ip_prefix='0.0.0.0/0')


def key_pair() -> None:
    """An ssh key for the demo user, whose private half lies with the data."""
    if not DEMO_KEY.exists():
        DEMO_KEY.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C',
                        'demo', '-f', str(DEMO_KEY)], check=True)
    compute = connect('demo', 'demo').compute
    if compute.find_keypair('demo') is None:
        compute.create_keypair(
            name='demo', public_key=pathlib.Path(
                f'{DEMO_KEY}.pub').read_text().strip())


def services_up(names: dict[tuple[str, str], float]) -> bool:
    """Whether Nova reports all of these (binary, host) as up.

    :param names: with the Unix time since when each runs: an older report
        is that of the process before it
    """
    try:
        found = {}
        for service in connect().compute.services():
            if service.state == 'up':
                # UTC without a zone; a new service has no report yet.
                at = service.updated_at
                found[service.binary, service.host] = (
                    datetime.datetime.fromisoformat(at).replace(
                        tzinfo=datetime.UTC).timestamp()
                    if at else time.time())
    except (openstack.exceptions.SDKException,
            auth_exceptions.ClientException):
        return False
    return all(name in found and found[name] >= since
               for name, since in names.items())


def hypervisors() -> set[str]:
    try:
        return {found.name for found in connect().compute.hypervisors()
                if found.state == 'up'}
    except (openstack.exceptions.SDKException,
            auth_exceptions.ClientException):
        return set()


#: Servers on the fake host, and no others, ask for this trait.
FAKE_TRAIT = 'CUSTOM_PYCONTAINER_FAKE_HOST'


def fake_host() -> None:
    """Aggregate, trait and flavors that keep the fake host apart."""
    cloud = connect()
    compute, placement = cloud.compute, cloud.placement
    name = layout.FAKE_HOST
    placement.put(f'/traits/{FAKE_TRAIT}',
                  microversion='1.6').raise_for_status()
    provider = next(placement.resource_providers(name=name))
    url = f'/resource_providers/{provider.id}/traits'
    traits = placement.get(url, microversion='1.6').json()
    if FAKE_TRAIT not in traits['traits']:
        traits['traits'].append(FAKE_TRAIT)
        placement.put(url, json=traits,
                      microversion='1.6').raise_for_status()
    aggregate = (compute.find_aggregate('fake') or
                 compute.create_aggregate(name='fake',
                                          availability_zone='fake'))
    if name not in (aggregate.hosts or []):
        compute.add_host_to_aggregate(aggregate, name)
    compute.set_aggregate_metadata(
        aggregate, {f'trait:{FAKE_TRAIT}': 'required'})
    existing = {flavor.name for flavor in compute.flavors(details=False)}
    for flavor, (vcpus, ram, disk) in FLAVORS.items():
        fake = flavor.replace('pyc.', 'fake.')
        if fake not in existing:
            made = compute.create_flavor(name=fake, vcpus=vcpus, ram=ram,
                                         disk=disk)
            compute.create_flavor_extra_specs(
                made, {f'trait:{FAKE_TRAIT}': 'required'})


def known_host(host: str) -> bool:
    return any(True for _ in connect().compute.services(host=host))


def forget_host(host: str,
                stop: typing.Callable[[], None] = lambda: None) -> None:
    """Removes a compute host with all of its servers from Nova.

    Nova's fake driver has another node identity at each start, which Nova
    refuses for a host that it knows.
    """
    cloud = connect()
    compute, placement = cloud.compute, cloud.placement

    def providers() -> list[str]:
        return [found.id for found in placement.resource_providers()
                if found.name == host]

    def servers() -> set[str]:
        found = {server.id for server in compute.servers(all_projects=True)
                 if server.compute_host == host}
        # A server whose creation failed has no host, but its allocation.
        for provider in providers():
            found.update(placement.get(
                f'/resource_providers/{provider}/allocations').json()[
                    'allocations'])
        return found

    deadline = time.monotonic() + 90
    while left := servers():
        if time.monotonic() > deadline:
            raise process.CloudError(
                f'servers on {host} cannot be deleted: {" ".join(left)}')
        for server in left:
            # On a host that is down this is done once Nova knows it is.
            compute.delete_server(server, ignore_missing=True)
        time.sleep(1)
    stop()
    for aggregate in list(compute.aggregates()):
        if host in (aggregate.hosts or []):
            compute.remove_host_from_aggregate(aggregate, host)
    nodes = [found.id for found in compute.hypervisors(details=False)
             if found.name == host]
    for provider in providers():
        if provider not in nodes:
            placement.delete_resource_provider(provider)
    for node in nodes:
        # Nova fails to delete a service whose provider is gone already.
        if node not in providers():
            placement.create_resource_provider(name=host, id=node)
    for service in list(compute.services(host=host)):
        compute.delete_service(service)


def remove_fake_host() -> None:
    """Takes the aggregate and the flavors of the fake host away."""
    compute = connect().compute
    aggregate = compute.find_aggregate('fake')
    if aggregate is not None:
        compute.delete_aggregate(aggregate)
    for flavor in list(compute.flavors(details=False)):
        if flavor.name.startswith('fake.'):
            compute.delete_flavor(flavor)
