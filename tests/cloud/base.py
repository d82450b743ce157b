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

"""Base of the tests that need a real cloud.

The cloud is brought up once through ``tools/cloud.sh up`` (which does
nothing when it is up) and is left up. All sizes are bytes, times seconds.
"""

import atexit
import base64
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import time
import typing
import uuid

from openstack import config
from openstack import connection
from openstack import exceptions
from testtools import content
from testtools import content_type

from tests import cases

REPO = pathlib.Path(__file__).resolve().parents[2]
WORK = pathlib.Path(os.environ.get('NOVA_PYCONTAINER_WORK') or
                    '/var/tmp/nova-pycontainer')
CLOUD = WORK / 'cloud'
LOGS = WORK / 'logs' / 'cloud'
HOSTS = ('host1', 'host2')
#: Limits of the part of one log that is attached to a failed test.
LOG_BYTES = 32_768
LOG_LINES = 60
LOG_WIDTH = 400
DEMO_KEY = CLOUD / 'keys' / 'demo'

#: ssh without questions, as whoever has the demo user's key.
SSH = ('ssh', '-i', str(DEMO_KEY), '-o', 'BatchMode=yes',
       '-o', 'StrictHostKeyChecking=no', '-o', 'UserKnownHostsFile=/dev/null',
       '-o', 'LogLevel=ERROR', '-o', 'ConnectTimeout=10')


class CommandError(Exception):
    """A command ended with a code other than 0."""


def _environment() -> dict[str, str]:
    """Ours, without the credentials of whoever runs the tests."""
    return {key: value for key, value in os.environ.items()
            if not key.startswith('OS_')}


def run(argv: typing.Sequence[str], timeout: float = 120,
        stdin: str | None = None,
        env: dict[str, str] | None = None) -> str:
    """Runs a command, returns its standard output.

    :raises CommandError: with all of its output
    """
    done = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=timeout,
        env={**_environment(), **(env or {})}, errors='replace')
    if done.returncode:
        raise CommandError(f'exit code {done.returncode} of '
                           f'{shlex.join(argv)}\n{done.stdout}{done.stderr}')
    return done.stdout


def cloud_sh(*args: str, timeout: float = 600) -> str:
    return run([str(REPO / 'tools' / 'cloud.sh'), *args], timeout)


_up = False


def ensure_cloud() -> None:
    """Brings the cloud up, once for each process that runs tests."""
    global _up
    if not _up:
        cloud_sh('up', timeout=900)
        _up = True


def connect(name: str, **kwargs: str) -> connection.Connection:
    """A connection as ``admin`` or ``demo``; keywords override."""
    found = config.OpenStackConfig(
        config_files=[str(CLOUD / 'clouds.yaml')], load_envvars=False)
    return connection.Connection(
        config=found.get_one(f'pyc-{name}', **kwargs),
        compute_api_version='2.96', app_name='nova-pycontainer-tests')


def wait_for(call: typing.Callable[[], typing.Any], timeout: float,
             what: str, interval: float = 0.3) -> typing.Any:
    """Waits until call() gives something true, and returns that.

    The limit is a guard against waiting for ever, never a requirement.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = call()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f'after {timeout:.0f} s still not: {what}')
        time.sleep(interval)


#: One for each process that runs tests: what a class keeps outlives a test.
_connections: dict[tuple[str, ...], connection.Connection] = {}


def connected(name: str, **kwargs: str) -> connection.Connection:
    key = (name, *sorted(kwargs.values()))
    if key not in _connections:
        _connections[key] = connect(name, **kwargs)
        atexit.register(_connections[key].close)
    return _connections[key]


class CloudTestCase(cases.TestCase):
    """Gives connections as administrator and as the demo user."""

    #: What the tests of a class share, or why it could not be made.
    _kept: dict[str, typing.Any]
    _keeping = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._kept = {}

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.fail('the test cloud needs root')
        ensure_cloud()
        self.admin = connected('admin')
        self.demo = connected('demo')
        self._log_sizes = {path.name: path.stat().st_size
                           for path in LOGS.glob('*.log')}
        self.addOnException(self._attach_logs)

    def kept(self, name: str, make: typing.Callable[[], typing.Any]
             ) -> typing.Any:
        """What make() gives, made once for all tests of the class.

        What it says to addCleanup is done when the class is over.
        """
        if name not in self._kept:
            self._keeping = True
            try:
                self._kept[name] = make()
            except Exception as e:
                self._kept[name] = e
                raise
            finally:
                self._keeping = False
        elif isinstance(self._kept[name], Exception):
            # Every test would wait as long as the first one did.
            self.fail(f'there is no {name}: {self._kept[name]}')
        return self._kept[name]

    def addCleanup(self, function, *args, **kwargs):
        add = (self.addClassCleanup if self._keeping
               else super().addCleanup)
        add(function, *args, **kwargs)

    def _attach_logs(self, exc_info):
        """What the services wrote since the test began."""
        for path in sorted(LOGS.glob('*.log')):
            start = self._log_sizes.get(path.name, 0)
            with open(path, 'rb') as log:
                size = log.seek(0, os.SEEK_END)
                if size <= start:
                    continue
                log.seek(max(start, size - LOG_BYTES))
                text = '\n'.join(
                    line[:LOG_WIDTH] for line in log.read().decode(
                        errors='replace').splitlines()[-LOG_LINES:])
            self.addDetail(path.name, content.Content(
                content_type.UTF8_TEXT,
                lambda text=text: [text.encode()]))

    # Hosts

    def on_host(self, host: str, *argv: str, timeout: float = 120) -> str:
        """Runs a command as root inside a host."""
        return cloud_sh('run', host, *argv, timeout=timeout)

    def service_pid(self, name: str) -> int:
        """The process of a service, by the name that ``status`` shows."""
        record = CLOUD / 'run' / 'processes' / f'{name}.json'
        return json.loads(record.read_text())['pid']

    def restart(self, *names: str) -> None:
        """Restarts services, and waits until they are ready again."""
        cloud_sh('restart', *names)

    def kill(self, name: str) -> None:
        """Kills a service as a crash would: at once, it alone.

        It is started again when the test is over.
        """
        pid = self.service_pid(name)
        self.addCleanup(cloud_sh, 'start', name)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not pathlib.Path(f'/proc/{pid}/exe').exists(),
                 10, f'{name} is dead')

    def cli(self, *args: str, user: str = 'demo') -> str:
        """The command-line client, as users type it."""
        return run([str(WORK / 'venv/bin/openstack'), '--os-cloud',
                    f'pyc-{user}', *args],
                   env={'OS_CLIENT_CONFIG_FILE':
                        str(CLOUD / 'clouds.yaml')})

    def containers(self, host: str) -> dict[str, typing.Any]:
        """What ``pycontainer list`` shows, by uuid."""
        return {info['uuid']: info for info in json.loads(
            self.on_host(host, 'pycontainer', 'list', '-f', 'json'))}

    def container(self, server: typing.Any) -> typing.Any:
        """What ``pycontainer show`` says on the server's host."""
        return json.loads(self.on_host(
            self.host_of(server), 'pycontainer', 'show', server.id,
            '-f', 'json'))

    def inside(self, server: typing.Any, script: str) -> str:
        """Runs a shell's script as root inside a server."""
        return self.on_host(
            self.host_of(server), 'pycontainer', 'exec', server.id, '--',
            '/bin/sh', '-c', script)

    def open_port(self, port: int) -> None:
        """Let everybody reach a TCP port of the demo project's servers."""
        group = self.demo.network.find_security_group('default')
        rule = self.demo.network.create_security_group_rule(
            security_group_id=group.id, direction='ingress',
            ether_type='IPv4', protocol='tcp', port_range_min=port,
            port_range_max=port, remote_ip_prefix='0.0.0.0/0')
        self.addCleanup(self.demo.network.delete_security_group_rule, rule)

    # Images

    def layers(self, host: str) -> list[dict[str, typing.Any]]:
        """What ``pycontainer layers`` shows."""
        return json.loads(self.on_host(
            host, 'pycontainer', 'layers', '-f', 'json'))

    def delete_layer(self, host: str, key: str) -> None:
        self.on_host(host, 'pycontainer', 'layers', '--delete', key)

    @staticmethod
    def image_file(name: str) -> str:
        """The path of one out of tools/images, built when needed."""
        return run([str(REPO / 'tools/images/build.sh'), name],
                   timeout=600).split()[-1]

    def image(self, name: str) -> typing.Any:
        """A public image out of tools/images, uploaded when needed."""
        path = self.image_file(name)
        name = pathlib.Path(path).name
        found = self.admin.image.find_image(name)
        if found is None:
            found = self.admin.image.create_image(
                name, filename=path, disk_format='raw',
                container_format='bare', visibility='public',
                allow_duplicates=True)
        return self.admin.image.wait_for_status(found, 'active')

    # Servers

    def create_server(self, image: str = 'debian13',
                      flavor: str = 'pyc.small', host: str | None = None,
                      networks: typing.Any = None, wait: bool = True,
                      name: str | None = None, timeout: float = 180,
                      **kwargs: typing.Any) -> typing.Any:
        """A server of the demo project, deleted when the test is over.

        :param image: a name of tools/images
        :param host: the host to put it on; only administrators may choose
        """
        if networks is None:
            project = self.admin.identity.find_project('demo')
            networks = [{'uuid': self.admin.network.find_network(
                'private', project_id=project.id).id}]
        if host is not None:
            kwargs['availability_zone'] = f'nova:{host}'
            cloud = self.as_demo_admin()
        else:
            cloud = self.demo
        kwargs.setdefault('key_name', 'demo')
        if isinstance(kwargs.get('user_data'), str):
            kwargs['user_data'] = base64.b64encode(
                kwargs['user_data'].encode()).decode()
        server = cloud.compute.create_server(
            name=name or self.id().rpartition('.')[2],
            image_id=kwargs.pop('image_id', None) or self.image(image).id,
            flavor_id=cloud.compute.find_flavor(flavor).id,
            networks=networks, **kwargs)
        self.addCleanup(self.delete_server, server.id)
        if not wait:
            return server
        return self.wait_server(server.id, 'ACTIVE', timeout)

    def boot(self, name: str, *options: str, image: str = 'debian13',
             flavor: str = 'pyc.small', wait: bool = True) -> typing.Any:
        """``openstack server create``, as the demo user types it.

        :param image: a name of tools/images
        """
        server_id = self.cli(
            'server', 'create', '--image', self.image(image).id,
            '--flavor', flavor, '--network', 'private', '--key-name', 'demo',
            *options, '-f', 'value', '-c', 'id', name).strip()
        self.addCleanup(self.delete_server, server_id)
        if not wait:
            return self.demo.compute.get_server(server_id)
        return self.wait_server(server_id, 'ACTIVE')

    def flavor(self, name: str, memory_mb: int, disk_gb: int,
               **extra_specs: str) -> str:
        """A public flavor with one CPU, deleted when it is over."""
        name = f'{name}-{uuid.uuid4().hex[:6]}'
        flavor = self.admin.compute.create_flavor(
            name=name, vcpus=1, ram=memory_mb, disk=disk_gb)
        self.addCleanup(self.admin.compute.delete_flavor, flavor.id)
        self.admin.compute.create_flavor_extra_specs(
            flavor, {key.replace('__', ':'): value
                     for key, value in extra_specs.items()})
        return name

    def as_demo_admin(self) -> connection.Connection:
        """The administrator, acting in the demo project."""
        admin = self.admin.identity.find_user('admin')
        project = self.admin.identity.find_project('demo')
        role = self.admin.identity.find_role('admin')
        self.admin.identity.assign_project_role_to_user(project, admin, role)
        cloud = connected('admin', project_name='demo')
        # Key pairs belong to users.
        if cloud.compute.find_keypair('demo') is None:
            cloud.compute.create_keypair(
                name='demo',
                public_key=pathlib.Path(f'{DEMO_KEY}.pub').read_text())
        return cloud

    def wait_server(self, server_id: str, status: str,
                    timeout: float = 180) -> typing.Any:
        """Waits for a status; fails with the fault if it becomes ERROR."""

        def reached():
            server = self.admin.compute.get_server(server_id)
            if server.status == 'ERROR' and status != 'ERROR':
                self.fail(f'server {server_id} is in ERROR: {server.fault}')
            return server if (server.status == status and
                              server.task_state is None) else None

        return wait_for(reached, timeout,
                        f'server {server_id} has status {status}')

    def delete_server(self, server_id: str, timeout: float = 120) -> None:
        self.admin.compute.delete_server(server_id, ignore_missing=True)

        def gone():
            try:
                server = self.admin.compute.get_server(server_id)
            except exceptions.NotFoundException:
                return True
            # While it is being deleted, what it did before may still fail.
            if server.status == 'ERROR' and server.task_state is None:
                self.fail(f'server {server_id} cannot be deleted: '
                          f'{server.fault}')
            return False

        wait_for(gone, timeout, f'server {server_id} is deleted')

    def host_of(self, server: typing.Any) -> str:
        return self.admin.compute.get_server(server.id).compute_host

    def console(self, server: typing.Any, lines: int | None = None) -> str:
        return self.demo.compute.get_server_console_output(
            server.id, length=lines)['output']

    def fixed_ip(self, server: typing.Any) -> str:
        server = self.demo.compute.get_server(server.id)
        return next(address['addr']
                    for addresses in server.addresses.values()
                    for address in addresses
                    if address['OS-EXT-IPS:type'] == 'fixed')

    def floating_ip(self, server: typing.Any) -> str:
        """Gives the server's first port a floating IP."""
        port = next(self.demo.network.ports(device_id=server.id))
        public = self.admin.network.find_network('public')
        floating = self.demo.network.create_ip(
            floating_network_id=public.id, port_id=port.id)
        self.addCleanup(self.demo.network.delete_ip, floating)
        return floating.floating_ip_address

    def ssh(self, address: str, command: str, user: str = 'root',
            timeout: float = 60) -> str:
        """Runs a command in a server through its floating IP."""
        return run([*SSH, f'{user}@{address}', command], timeout)

    def wait_ssh(self, address: str, user: str = 'root',
                 timeout: float = 120) -> None:
        """Waits until a command runs in the server over ssh."""
        last = None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                socket.create_connection((address, 22), timeout=3).close()
                self.ssh(address, 'true', user)
                return
            except (OSError, CommandError,
                    subprocess.TimeoutExpired) as error:
                last = error
                time.sleep(0.5)
        self.fail(f'no ssh to {user}@{address} after {timeout} s: {last}')
