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

"""Brings the cloud up."""

import json
import os
import pathlib
import subprocess
import sys
import time

from cloud import config
from cloud import graph
from cloud import hosts
from cloud import layout
from cloud import network
from cloud import process
from cloud import schema
from cloud import seed
from cloud import services

SETTINGS = layout.RUN / 'settings.json'
READY = layout.RUN / 'ready'


def settings() -> dict[str, str]:
    try:
        return json.loads(SETTINGS.read_text())
    except FileNotFoundError:
        return {}


def ensure_user() -> None:
    """The user of the services, if the machine has none of that name."""
    try:
        layout.uid(layout.USER)
    except KeyError:
        subprocess.run(
            ['useradd', '--system', '--user-group', '--home-dir',
             '/var/lib/nova', '--no-create-home', '--shell',
             '/usr/sbin/nologin', layout.USER], check=True)
        layout.DATA.mkdir(parents=True, exist_ok=True)
        (layout.DATA / 'user-created').touch()


def check_machine() -> None:
    if os.geteuid() != 0:
        raise process.CloudError('the test cloud needs root')
    for path in ('/etc', '/run', '/var/lib', '/sys'):
        if pathlib.Path(path) in layout.WORK.parents:
            raise process.CloudError(
                f'{layout.WORK} lies below {path}, which the hosts see '
                'otherwise: set NOVA_PYCONTAINER_WORK to another place')
    for path in (layout.WORK, *layout.WORK.parents):
        if path.is_dir() and not path.stat().st_mode & 0o001:
            raise process.CloudError(
                f'{path} is closed to unprivileged users, but the services '
                'run as one: set NOVA_PYCONTAINER_WORK to another place')
    if not pathlib.Path('/dev/net/tun').exists():
        raise process.CloudError(
            'there is no /dev/net/tun: the userspace datapath of Open '
            'vSwitch needs the tun driver')


def complete(driver: str) -> bool:
    """Whether the whole cloud runs already, with this driver."""
    if not READY.exists() or settings().get('driver') != driver:
        return False
    names = set(services.all_services(driver))
    names.update(hosts.pause_name(host) for host in layout.ALL_HOSTS)
    names.update(('ovn-nb', 'ovn-sb', 'ovn-northd'))
    for host in layout.COMPUTES:
        names.update((f'{host}.ovsdb-server', f'{host}.ovs-vswitchd',
                      f'{host}.ovn-controller'))
    return all(process.alive(name) for name in names)


def _make_hosts() -> None:
    fresh = [host for host in layout.ALL_HOSTS
             if not process.alive(hosts.pause_name(host))]
    made = layout.RUN / 'hosts-made'
    if not fresh and made.exists():
        return
    if len(fresh) < len(layout.ALL_HOSTS):
        raise process.CloudError(
            'only a part of the hosts is there '
            f'(missing: {", ".join(fresh) or "some of their links"}): '
            'run tools/cloud.sh down first')
    made.unlink(missing_ok=True)
    for host in layout.ALL_HOSTS:
        hosts.create(host)
    network.link_controller()
    for host in layout.COMPUTES:
        network.link_compute(host)
    network.link_migration()
    made.touch()


def _write_clients() -> None:
    """openrc files and a clouds.yaml for whoever uses the cloud."""
    lines = ['clouds:']
    for user, project in (('admin', 'admin'), ('demo', 'demo')):
        rc = layout.openrc(user, project)
        path = layout.CLOUD / f'openrc-{user}'
        path.write_text(''.join(f"export {key}='{value}'\n"
                                for key, value in rc.items()))
        path.chmod(0o600)
        lines += [f'  pyc-{user}:', f'    region_name: {layout.REGION}',
                  "    identity_api_version: '3'", '    auth:',
                  f'      auth_url: {rc["OS_AUTH_URL"]}',
                  f'      username: {user}',
                  f'      password: {rc["OS_PASSWORD"]}',
                  f'      project_name: {project}',
                  '      user_domain_name: Default',
                  '      project_domain_name: Default']
    path = layout.CLOUD / 'clouds.yaml'
    path.write_text('\n'.join(lines) + '\n')
    path.chmod(0o600)


def _compute_ready() -> None:
    names = {f'{host}.nova-compute': ('nova-compute', host)
             for host in layout.COMPUTES}
    names.update((name, (name, layout.CONTROLLER))
                 for name in ('nova-scheduler', 'nova-conductor'))
    wanted = {key: process.Record.load(name).at
              for name, key in names.items()}
    deadline = time.monotonic() + 120
    while not seed.services_up(wanted):
        for name in names:
            if not process.alive(name):
                raise process.ServiceError(name, 'ended while starting')
        if time.monotonic() > deadline:
            raise process.ServiceError(
                'host1.nova-compute',
                'Nova does not report all services as up')
        time.sleep(0.5)
    known = layout.DATA / 'hosts-discovered'
    if not known.exists():
        schema.discover_hosts()
        known.touch()
    while seed.hypervisors() < set(layout.COMPUTES):
        if time.monotonic() > deadline:
            raise process.ServiceError(
                'host1.nova-compute', 'Nova does not list both hypervisors')
        time.sleep(0.5)


def up(driver: str) -> None:
    check_machine()
    if complete(driver):
        graph.say(f'the cloud is up (driver: {driver})')
        return
    if process.records() and settings().get('driver', driver) != driver:
        switch_driver(driver)
    ensure_user()
    for path in (layout.RUN, layout.DATA, layout.LOGS, layout.HOSTS):
        path.mkdir(parents=True, exist_ok=True)
    layout.DATA.chmod(0o711)
    SETTINGS.write_text(json.dumps({'driver': driver}))
    for name in ('admin', 'demo'):
        layout.secret(name)
    _write_clients()

    known = services.all_services(driver)
    steps = graph.Graph()

    def start(name: str, *needs: str) -> None:
        steps.add(name, known[name].start, *needs)

    def configure() -> None:
        config.write_controller()
        for host in layout.COMPUTES:
            config.write_compute(host, driver)
        schema.keystone_keys()
        services.prepare_glance()
        services.prepare_rabbitmq()

    steps.add('hosts', _make_hosts)
    steps.add('configuration', configure, 'hosts')
    steps.add('mariadb-install', services.prepare_mariadb, 'configuration')
    start('mariadb', 'mariadb-install')
    start('memcached', 'configuration')
    steps.add('databases', schema.create_databases, 'mariadb')
    # In this order the longest chain begins first.
    steps.add('keystone-schema', schema.keystone, 'databases')
    start('keystone', 'keystone-schema', 'memcached')
    steps.add('nova-api-schema', schema.nova_api, 'databases')
    steps.add('nova-schema', schema.nova_cells, 'nova-api-schema')
    steps.add('neutron-schema', schema.neutron, 'databases')
    start('rabbitmq', 'configuration')
    steps.add('placement-schema', schema.placement, 'databases')
    steps.add('glance-schema', schema.glance, 'databases')
    steps.add('ovn', network.start_ovn_central, 'configuration')
    for host in layout.COMPUTES:
        steps.add(f'{host}.openvswitch',
                  lambda host=host: network.start_ovs(host), 'configuration')
        steps.add(f'{host}.ovn-controller',
                  lambda host=host: network.start_ovn_controller(host),
                  f'{host}.openvswitch', 'ovn')
        if driver == 'pycontainer':
            start(f'{host}.lxcfs', 'configuration')
            start(f'{host}.agent', f'{host}.openvswitch', f'{host}.lxcfs')

    def forget_fakes() -> None:
        if layout.DRIVER.exists() and layout.DRIVER.read_text() == 'fake':
            for host in layout.COMPUTES:
                if not process.alive(f'{host}.nova-compute'):
                    seed.forget_host(host)
                    (layout.DATA / 'hosts-discovered').unlink(
                        missing_ok=True)
        layout.DRIVER.write_text(driver)

    steps.add('identity', seed.identity, 'keystone')
    start('placement', 'placement-schema', 'memcached')
    start('nova-conductor', 'nova-schema', 'rabbitmq')
    start('nova-api', 'nova-schema', 'rabbitmq', 'memcached')
    start('neutron', 'neutron-schema', 'ovn', 'rabbitmq', 'identity')
    start('glance', 'glance-schema', 'memcached')
    start('nova-scheduler', 'nova-schema', 'rabbitmq', 'identity')
    steps.add('nodes of the fake driver', forget_fakes, 'nova-api',
              'identity', 'placement')
    for host in layout.COMPUTES:
        needs = [f'{host}.openvswitch', 'nova-conductor',
                 'nodes of the fake driver']
        if driver == 'pycontainer':
            needs.append(f'{host}.agent')
        start(f'{host}.nova-compute', *needs)
        start(f'{host}.metadata-agent', f'{host}.ovn-controller', 'neutron')
    start('nova-metadata', 'nova-schema', 'rabbitmq', 'memcached')
    start('nova-serialproxy', 'nova-schema')
    start('neutron-ovn-maintenance-worker', 'neutron')
    start('neutron-periodic-workers', 'neutron')
    steps.add('flavors', seed.flavors, 'identity', 'nova-api')
    steps.add('networks', seed.networks, 'neutron',
              *(f'{host}.ovn-controller' for host in layout.COMPUTES))
    steps.add('key pair', seed.key_pair, 'identity', 'nova-api')
    steps.add('compute services', _compute_ready,
              'identity', 'nova-api', 'nova-scheduler',
              *(f'{host}.nova-compute' for host in layout.COMPUTES))
    steps.run()
    READY.touch()
    graph.say(f'the cloud is up (driver: {driver}); '
              'eval "$(tools/cloud.sh openrc)" to use it')


def switch_driver(driver: str) -> None:
    """Restarts the compute services with the other driver."""
    graph.say(f'switching the compute hosts to the driver: {driver}')
    READY.unlink(missing_ok=True)
    process.stop([f'{host}.nova-compute' for host in layout.COMPUTES])
    process.stop([f'{host}.agent' for host in layout.COMPUTES])


def start_service(name: str) -> None:
    driver = settings().get('driver', 'pycontainer')
    known = services.all_services(driver)
    fake = services.fake_compute()
    known[fake.name] = fake
    if name not in known:
        raise process.CloudError(
            f'no service {name}; there are: {" ".join(sorted(known))}')
    known[name].start()


def fake_host_up() -> None:
    """A compute service with Nova's fake driver, for comparison."""
    host = layout.FAKE_HOST
    state = '/var/lib/nova-fake'
    sections = config.nova(host, 'compute',
                           layout.UNDERLAY[layout.CONTROLLER],
                           config.DRIVERS['fake'])
    sections['DEFAULT'].update(state_path=state,
                               instances_path=f'{state}/instances')
    sections['oslo_concurrency']['lock_path'] = f'{state}/lock'
    hosts.make_dir(layout.CONTROLLER, '/etc/nova-fake')
    hosts.write(layout.CONTROLLER, '/etc/nova-fake/nova.conf',
                config.render(sections), 0o640, layout.USER)
    store = layout.DATA / 'nova-fake'
    store.mkdir(parents=True, exist_ok=True)
    os.chown(store, layout.uid(layout.USER), layout.gid(layout.USER))
    hosts.script(layout.CONTROLLER,
                 f'mkdir -p {state}; mountpoint -q {state} || '
                 f'mount --bind {store} {state}')
    service = services.fake_compute()
    if not service.alive and seed.known_host(host):
        # Nova's fake driver has another node identity at each start.
        fake_host_down()
    network.start_fake_chassis()
    service.start()
    deadline = time.monotonic() + 90
    discovered = False
    while host not in seed.hypervisors():
        if not service.alive:
            raise process.ServiceError(service.name, 'ended while starting')
        if time.monotonic() > deadline:
            raise process.ServiceError(service.name, 'not up after 90 s')
        if not discovered and seed.services_up(
                {('nova-compute', host): process.Record.load(
                    service.name).at}):
            schema.discover_hosts()
            discovered = True
        time.sleep(0.5)
    seed.fake_host()
    graph.say(f'{host} is up: flavors fake.tiny, fake.small, fake.medium; '
              'availability zone fake')


def fake_host_down() -> None:
    """Removes the fake host with its servers, which are nothing anyway."""
    seed.forget_host(layout.FAKE_HOST, lambda: process.stop(
        [services.fake_compute().name]))
    seed.remove_fake_host()
    network.stop_fake_chassis()
    graph.say(f'{layout.FAKE_HOST} is gone')


if __name__ == '__main__':
    sys.exit('use tools/cloud.sh')
