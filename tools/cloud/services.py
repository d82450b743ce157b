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

"""The long-running services: what each is, how it starts, when it is ready.

Names are ``<service>`` on the controller and ``<host>.<service>`` on the
compute hosts.
"""

import dataclasses
import http.client
import os
import pathlib
import socket
import typing

from cloud import hosts
from cloud import layout
from cloud import process


@dataclasses.dataclass
class Service:
    name: str
    host: str
    argv: list[str]
    user: str | None = None
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    ready: typing.Callable[[], bool] = lambda: True
    #: Seconds until it has to be ready.
    timeout: float = 90

    @property
    def alive(self) -> bool:
        return process.alive(self.name)

    def start(self) -> None:
        if not self.alive:
            env = {'HOME': '/var/lib/nova' if self.user == layout.USER
                   else '/root',
                   # Goes with the host, whatever a service leaves there.
                   'TMPDIR': '/run/tmp', **self.env}
            process.spawn(self.name,
                          hosts.enter(self.host, self.argv, self.user),
                          self.host, env)
        process.wait_ready(self.name, self.ready, self.timeout)


def listens(port: int, address: str = layout.API) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def answers(port: int, path: str = '/') -> bool:
    """An HTTP service gives any answer that is no failure of its own."""
    connection = http.client.HTTPConnection(layout.API, port, timeout=20)
    try:
        connection.request('GET', path)
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def has_socket(host: str, path: str) -> bool:
    """Something accepts connections on a unix socket inside the host."""
    try:
        target = hosts.root(host) / path.lstrip('/')
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            # The path through /proc is longer than a socket's name may be.
            fd = os.open(target.parent, os.O_PATH)
            try:
                client.connect(f'/proc/self/fd/{fd}/{target.name}')
            finally:
                os.close(fd)
    except (OSError, process.CloudError):
        return False
    return True


def has_file(host: str, path: str) -> bool:
    """Also of a file system that does not answer, which has none."""
    try:
        return (hosts.root(host) / path.lstrip('/')).exists()
    except OSError:
        return False


def venv(name: str) -> str:
    return str(layout.VENV / 'bin' / name)


MARIADB_DATA = layout.DATA / 'mariadb'
RABBIT_DATA = layout.DATA / 'rabbitmq'


def mariadb() -> Service:
    # Durability is given up for speed: a test cloud.
    return Service('mariadb', layout.CONTROLLER, [
        'mariadbd', '--no-defaults', f'--datadir={MARIADB_DATA}',
        '--user=mysql', f'--bind-address={layout.API}',
        '--socket=/run/mysqld/mysqld.sock', '--skip-name-resolve',
        '--pid-file=/run/mysqld/mysqld.pid', '--max-connections=1000',
        '--innodb-buffer-pool-size=256M', '--innodb-log-file-size=64M',
        '--innodb-flush-log-at-trx-commit=0', '--innodb-doublewrite=0',
        '--innodb-flush-method=nosync', '--skip-log-bin',
        '--character-set-server=utf8mb4',
        '--collation-server=utf8mb4_general_ci'],
        ready=lambda: has_socket(layout.CONTROLLER,
                                 '/run/mysqld/mysqld.sock'))


def rabbitmq() -> Service:
    base = RABBIT_DATA
    return Service('rabbitmq', layout.CONTROLLER, [
        '/usr/lib/rabbitmq/bin/rabbitmq-server'], user='rabbitmq',
        env={'HOME': str(base), 'RABBITMQ_NODENAME': 'rabbit@controller',
             'RABBITMQ_MNESIA_BASE': str(base / 'mnesia'),
             'RABBITMQ_LOG_BASE': str(base / 'log'), 'RABBITMQ_LOGS': '-',
             'RABBITMQ_CONFIG_FILE': '/etc/rabbitmq/cloud.conf',
             'RABBITMQ_CONF_ENV_FILE': '/dev/null',
             'RABBITMQ_ENABLED_PLUGINS_FILE': '/etc/rabbitmq/no_plugins',
             'RABBITMQ_PID_FILE': str(base / 'rabbitmq.pid'),
             # Keeps it quiet on a machine with two cores.
             'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS':
             '+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none'},
        ready=lambda: listens(layout.PORTS['rabbitmq']))


def memcached() -> Service:
    return Service('memcached', layout.CONTROLLER, [
        'memcached', '-u', 'memcache', '-m', '64', '-l', layout.API],
        ready=lambda: listens(layout.PORTS['memcached']))


def _wsgi(name: str, env: dict[str, str], path: str = '/') -> Service:
    return Service(name, layout.CONTROLLER,
                   [venv('uwsgi'), '--ini', f'/etc/uwsgi/{name}.ini'],
                   user=layout.USER, env=env,
                   ready=lambda: answers(layout.PORTS[name], path))


def keystone() -> Service:
    return _wsgi('keystone', {'OS_KEYSTONE_CONFIG_DIR': '/etc/keystone',
                              'OS_KEYSTONE_CONFIG_FILES': 'keystone.conf'},
                 '/v3')


def glance() -> Service:
    return _wsgi('glance', {'OS_GLANCE_CONFIG_DIR': '/etc/glance'},
                 '/versions')


def placement() -> Service:
    return _wsgi('placement', {'OS_PLACEMENT_CONFIG_DIR': '/etc/placement'})


def neutron() -> Service:
    return _wsgi('neutron', {
        'OS_NEUTRON_CONFIG_DIR': '/etc/neutron',
        'OS_NEUTRON_CONFIG_FILES': 'neutron.conf;ml2_conf.ini'})


def neutron_worker(name: str) -> Service:
    return Service(name, layout.CONTROLLER, [
        venv(name), '--config-file', '/etc/neutron/neutron.conf',
        '--config-file', '/etc/neutron/ml2_conf.ini'], user=layout.USER)


def nova_api() -> Service:
    # The directory only: with a list of files paste.deploy looks for the
    # pipeline in nova.conf.
    return _wsgi('nova-api', {'OS_NOVA_CONFIG_DIR': '/etc/nova'})


def nova_metadata() -> Service:
    return _wsgi('nova-metadata', {'OS_NOVA_CONFIG_DIR': '/etc/nova'})


def nova_daemon(name: str,
                ready: typing.Callable[[], bool] = lambda: True) -> Service:
    return Service(name, layout.CONTROLLER,
                   [venv(name), '--config-file', '/etc/nova/nova.conf'],
                   user=layout.USER, ready=ready)


def metadata_agent(host: str) -> Service:
    return Service(f'{host}.metadata-agent', host, [
        venv('neutron-ovn-metadata-agent'), '--config-file',
        '/etc/neutron/neutron_ovn_metadata_agent.ini'])


def lxcfs(host: str) -> Service:
    """Before the agent, which looks for its mount when a guest starts."""
    mount = '/var/lib/lxcfs'
    return Service(f'{host}.lxcfs', host, [
        str(layout.REPO / 'tools/lib/lxcfs.sh'), mount],
        ready=lambda: has_file(host, f'{mount}/proc/meminfo'))


def agent(host: str) -> Service:
    return Service(f'{host}.agent', host, [
        venv('pycontainer-agent'), '--config-file',
        '/etc/pycontainer/agent.conf'],
        ready=lambda: has_socket(host, '/run/pycontainer/agent.sock'))


def nova_compute(host: str) -> Service:
    return Service(f'{host}.nova-compute', host, [
        venv('nova-compute'), '--config-file', '/etc/nova/nova.conf'],
        user=layout.USER)


def fake_compute() -> Service:
    return Service(f'{layout.FAKE_HOST}.nova-compute', layout.CONTROLLER, [
        venv('nova-compute'), '--config-file', '/etc/nova-fake/nova.conf'],
        user=layout.USER)


def all_services(driver: str) -> dict[str, Service]:
    """Every service beside Open vSwitch and OVN, by its name."""
    found = [mariadb(), rabbitmq(), memcached(), keystone(), glance(),
             placement(), neutron(),
             neutron_worker('neutron-ovn-maintenance-worker'),
             neutron_worker('neutron-periodic-workers'),
             nova_api(), nova_metadata(), nova_daemon('nova-scheduler'),
             nova_daemon('nova-conductor'),
             nova_daemon('nova-serialproxy',
                         lambda: listens(layout.PORTS['serialproxy']))]
    for host in layout.COMPUTES:
        found.append(metadata_agent(host))
        if driver == 'pycontainer':
            found += [lxcfs(host), agent(host)]
        found.append(nova_compute(host))
    return {service.name: service for service in found}


def prepare_mariadb() -> None:
    user, group = layout.uid('mysql'), layout.gid('mysql')
    hosts.make_dir(layout.CONTROLLER, '/run/mysqld', owner='mysql')
    if not (MARIADB_DATA / 'mysql').is_dir():
        MARIADB_DATA.mkdir(parents=True, exist_ok=True)
        os.chown(MARIADB_DATA, user, group)
        hosts.run(layout.CONTROLLER, [
            'mariadb-install-db', '--no-defaults', '--user=mysql',
            f'--datadir={MARIADB_DATA}', '--skip-test-db',
            '--auth-root-authentication-method=socket',
            '--skip-name-resolve'], log='mariadb-install')


def prepare_rabbitmq() -> None:
    user = 'rabbitmq'
    for path in (RABBIT_DATA, RABBIT_DATA / 'mnesia', RABBIT_DATA / 'log'):
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, layout.uid(user), layout.gid(user))
    hosts.write(layout.CONTROLLER, '/etc/rabbitmq/cloud.conf', f'''
listeners.tcp.1 = {layout.API}:{layout.PORTS["rabbitmq"]}
loopback_users = none
default_user = openstack
default_pass = {layout.secret("rabbit")}
log.console.level = warning
''')
    hosts.write(layout.CONTROLLER, '/etc/rabbitmq/no_plugins', '[].\n')


def prepare_glance() -> None:
    """Images live with the data, under the path that the service knows."""
    store = layout.DATA / 'glance'
    for part in ('images', 'staging', 'tasks', 'lock'):
        (store / part).mkdir(parents=True, exist_ok=True)
    for path in (store, *store.iterdir()):
        os.chown(path, layout.uid(layout.USER), layout.gid(layout.USER))
    target = '/var/lib/glance'
    hosts.script(layout.CONTROLLER,
                 f'mkdir -p {target}; mountpoint -q {target} || '
                 f'mount --bind {store} {target}')


def sql(text: str) -> None:
    path = pathlib.Path('/run/mysqld/mysqld.sock')
    hosts.run(layout.CONTROLLER, ['mariadb', '--no-defaults',
                                  f'--socket={path}', '-e', text])
