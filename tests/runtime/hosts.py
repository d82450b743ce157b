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

"""Two hosts within one test: namespaces with an agent each, and a link.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid as uuidlib

from nova_pycontainer.agent import client
from nova_pycontainer.runtime import errors
from tests import cases
from tests.runtime import base

BIN = pathlib.Path(sys.executable).parent
IN_HOST = base.ROOT / 'tools/lib/in-host.sh'


class Agent(client.Client):
    """One host: its namespaces, its agent, and the client of that."""

    def __init__(self, name, address, directory):
        self.name = name
        self.address = address
        self.directory = directory
        self.log = directory / 'agent.log'
        self.cgroup_parent = f'pyc-test-{os.getpid()}-{name}'
        directory.mkdir(mode=0o711)
        (directory / 'state').mkdir(mode=0o711)
        shared = base.WORK / 'test-layers'
        shared.mkdir(mode=0o700, exist_ok=True)
        (directory / 'state' / 'layers').symlink_to(shared)
        self._hold()
        self.process = None
        #: See nova_pycontainer.runtime.faults.
        self.faults = ''
        self.record = ''
        #: More of the agent's environment.
        self.env = {}
        super().__init__(self._socket)

    @property
    def _socket(self):
        return f'/proc/{self.pid}/root/run/pyc/agent.sock'

    @property
    def instances(self):
        """Where it has its instances, as seen from outside of it."""
        return pathlib.Path(
            f'/proc/{self.pid}/root{self.directory}/state/instances')

    def _hold(self):
        # Keeps the namespaces; everything else enters them by its pid.
        self.holder = subprocess.Popen(
            [IN_HOST, 'sh', '-c', 'echo; exec sleep infinity'],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self.holder.stdout.read(1) == b'\n'
        self.pid = self.holder.pid

    def _release(self):
        self.holder.kill()
        self.holder.wait(base.PATIENCE)
        self.holder.stdout.close()

    def power_off(self, everything):
        """Nobody is asked, and nothing is put away.

        :param everything: gives the pids of the host's processes, those that
            have left its namespaces among them
        """
        # Whoever starts programs goes first.
        self.process.kill()
        while pids := everything():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(base.PATIENCE)
        # With it the namespaces: mounts, links and /run.
        self._release()
        self._remove_cgroups()

    def power_on(self):
        """Nothing is known but what is on the disk. The agent is not
        started.

        That the kernel is the same one cannot be hidden: a mount over its
        boot_id would have guests refused a /proc.
        """
        self._hold()
        self._path = self._socket

    def has_power(self):
        return self.holder.returncode is None

    def enter(self, *argv):
        return ['nsenter', '-t', str(self.pid), '-n', '-m', '-u', *argv]

    def run(self, *argv, **kwargs):
        kwargs = {'check': True, 'timeout': 60, 'text': True,
                  'stdout': subprocess.PIPE} | kwargs
        return subprocess.run(self.enter(*argv), **kwargs)

    def start_agent(self, **options):
        conf = self.directory / 'agent.conf'
        conf.write_text('[pycontainer]\n' + ''.join(
            f'{key} = {value}\n' for key, value in {
                'state_dir': self.directory / 'state',
                'run_dir': '/run/pyc',
                'agent_socket': '/run/pyc/agent.sock',
                'agent_group': 'root',
                'oci_runtime_path': base.tool('crun'),
                'criu_path': base.tool('criu'),
                'cgroup_parent': self.cgroup_parent,
                'migration_address': self.address,
                'preflight_at_start': False,
                **options}.items()))
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(
                self.enter(str(BIN / 'pycontainer-agent'), '--config-file',
                           str(conf)),
                env={**os.environ, 'PYCONTAINER_FAULTS': self.faults,
                     'PYCONTAINER_FAULT_POINTS': str(self.record),
                     'PYTHONFAULTHANDLER': '1',
                     **self.env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        base.wait_for(self._answers, f'the agent of {self.name}')

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError(self.log.read_text())
        try:
            return self.host_info()
        except errors.AgentUnavailable:
            return None

    def agent_pid(self):
        """nsenter only enters no PID namespace: it becomes the agent."""
        return self.process.pid

    def kill_agent(self):
        self.process.kill()
        self.process.wait(base.PATIENCE)

    def stop_agent(self):
        """As a service manager does; one that has ended is no error."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(base.PATIENCE)
        except subprocess.TimeoutExpired:
            # Has it write down what its threads do.
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(base.PATIENCE)
            raise AssertionError(
                'the agent did not end:\n' +
                self.log.read_text()[-20000:]) from None

    def restart_agent(self, faults='', **options):
        """:param faults: see nova_pycontainer.runtime.faults"""
        self.stop_agent()
        self.faults = faults
        self.start_agent(**options)

    def stop(self):
        if not self.has_power():
            return
        if self.process is not None and self.process.poll() is None:
            for info in self.list():
                with contextlib.suppress(errors.ContainerError):
                    self.delete(info['uuid'])
            self.stop_agent()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        base.wait_for(lambda: not self.pids(), 'the end of the processes')
        self._release()
        self._remove_cgroups()

    def _remove_cgroups(self):
        for parent in (pathlib.Path('/sys/fs/cgroup'),
                       *pathlib.Path('/run/cgroup1').glob('*')):
            top = parent / self.cgroup_parent
            # What is below is of a host without power.
            for directory, _, _ in os.walk(top, topdown=False):
                _remove_cgroup(pathlib.Path(directory))

    def pids(self):
        """Our processes in the host's mount namespace, but the holder."""
        mine = os.readlink(f'/proc/{self.pid}/ns/mnt')
        found = []
        for entry in pathlib.Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                if (os.readlink(entry / 'ns/mnt') == mine and
                        int(entry.name) != self.pid):
                    found.append(int(entry.name))
        return found


def _remove_cgroup(path):
    def removed():
        try:
            path.rmdir()
        except OSError as e:
            # Its last process is still about to go.
            return e.errno != errno.EBUSY
        return True

    base.wait_for(removed, f'the end of {path}')


class TwoHostsTestCase(cases.TestCase):
    """``self.a`` and ``self.b``, and a switch that the test is on too."""

    agent_options: dict[str, object] = {}

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest('containers need root; run tools/run_tests.sh')
        if not os.access('/sys/fs/cgroup/cgroup.procs', os.R_OK):
            self.skipTest('no cgroup v2 at /sys/fs/cgroup; run the test '
                          'under tools/lib/in-host.sh')
        self.top = pathlib.Path(tempfile.mkdtemp(
            prefix='pyc-', dir=base.WORK if base.WORK.is_dir() else None))
        self.addCleanup(shutil.rmtree, self.top)
        self.top.chmod(0o711)
        # Tenants' network; the hosts' own is one link between them.
        self.bridge = f'br{os.getpid()}'
        self._ip('link', 'add', self.bridge, 'type', 'bridge',
                 'forward_delay', '0')
        self.addCleanup(self._ip, 'link', 'del', self.bridge)
        self._ip('address', 'add', '203.0.113.1/24', 'dev', self.bridge)
        self._ip('link', 'set', self.bridge, 'up')
        self.a = self._host('a', '198.51.100.1')
        self.b = self._host('b', '198.51.100.2')
        self._connect()
        for host in (self.a, self.b):
            host.start_agent(**self.agent_options)

    def _ip(self, *argv):
        subprocess.run(['ip', *argv], check=True, timeout=30)

    def _host(self, name, address):
        made = Agent(name, address, self.top / name)
        self.addCleanup(made.stop)
        return made

    def _connect(self):
        self._connect_hosts()
        for host in (self.a, self.b):
            self._connect_uplink(host)

    def _connect_hosts(self):
        """The hosts' own network."""
        self._ip('link', 'add', 'hostlink', 'netns', str(self.a.pid), 'type',
                 'veth', 'peer', 'name', 'hostlink', 'netns',
                 str(self.b.pid))
        for host in (self.a, self.b):
            host.run('ip', 'address', 'add', f'{host.address}/24', 'dev',
                     'hostlink')
            host.run('ip', 'link', 'set', 'hostlink', 'up')

    def _connect_uplink(self, host):
        """A bridge of the host, that the test's bridge is the spine of."""
        uplink = f'up{host.name}{os.getpid()}'
        self._ip('link', 'add', uplink, 'master', self.bridge, 'up',
                 'type', 'veth', 'peer', 'name', 'uplink', 'netns',
                 str(host.pid))
        # The kernel destroys it with the namespace, some time later.
        self.addCleanup(subprocess.run, ['ip', 'link', 'del', uplink],
                        timeout=30, stderr=subprocess.DEVNULL)
        host.run('ip', 'link', 'add', 'br-int', 'type', 'bridge',
                 'forward_delay', '0')
        host.run('ip', 'link', 'set', 'br-int', 'up')
        host.run('ip', 'link', 'set', 'uplink', 'master', 'br-int', 'up')

    # What most tests do

    #: Which image one of that name is; others have another one.
    layer_key = staticmethod(base.layer_key)

    def layer(self, name):
        key, path = self.layer_key(name)
        if not self.a.layer_present(key):
            with open(path, 'rb') as f:
                self.a.layer_import(
                    key, iter(lambda: f.read(1 << 20), b''), image=name,
                    max_bytes=4096 * base.MIB)
        return key

    def spec(self, name='busybox', *, memory=256, address=None, **more):
        nics = []
        if address:
            ident = uuidlib.uuid4().hex[:11]
            nics = [{'id': ident + '-x', 'devname': 'tap' + ident,
                     'mac': f'fa:16:3e:00:00:{int(address.split(".")[3]):02x}',
                     'mtu': 1500, 'tx_offload': True}]
        return {'name': 'test', 'hostname': 'test', 'image_id': name,
                'layer': self.layer(name), 'nics': nics,
                'resources': {'memory_bytes': memory * base.MIB, 'vcpus': 1,
                              'pids_max': 512,
                              'disk_bytes': 1024 * base.MIB},
                'config_drive': None, **more}

    def run_container(self, *args, host=None, address=None, **kwargs):
        host = host or self.a
        uuid = str(uuidlib.uuid4())
        host.define(uuid, self.spec(*args, address=address, **kwargs))
        host.prepare(uuid)
        self.attach(host, uuid)
        host.start_container(uuid)
        if address:
            self.sh(host, uuid, base.NO_DHCP +
                    f'ip address add {address}/24 dev eth0; '
                    'ip link set eth0 up')
            # A former guest of this address was last heard on another host,
            # and the bridges believe it until this one speaks. It answers a
            # question to all; the kernel would ask one after some 25 s.
            self._ip('neighbour', 'flush', 'to', address)
        return uuid

    def dhcp(self):
        """A DHCP server on the tenants' network."""
        server = subprocess.Popen(
            ['dnsmasq', '--keep-in-foreground', '--port=0', '--conf-file=',
             '--pid-file=', '--no-ping', '--bind-interfaces',
             f'--interface={self.bridge}', '--except-interface=lo',
             '--dhcp-range=203.0.113.100,203.0.113.200,255.255.255.0,2m',
             f'--dhcp-leasefile={self.top}/leases'],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait, 10)
        self.addCleanup(server.terminate)

    def lease(self):
        """The address that the DHCP server has given away."""
        def read():
            try:
                return (self.top / 'leases').read_text().split()[2]
            except (OSError, IndexError):
                return None

        return base.wait_for(read, 'a lease')

    def attach(self, host, uuid):
        for nic in host.info(uuid)['nics']:
            host.run('ip', 'link', 'set', nic['devname'], 'master', 'br-int')

    def sh(self, host, uuid, script, timeout_s=base.PATIENCE):
        done = host.exec(
            uuid, ['/bin/sh', '-c', script], timeout_s=timeout_s)
        if done['exit_code']:
            raise AssertionError(f'{script!r}: {done["stderr"]!r}')
        return done['stdout'].decode().strip()

    def migrate(self, uuid, source, destination, **options):
        """Move a container, as the driver does; returns both progresses."""
        migration = self.prepare_migration(
            uuid, source, destination, **options)
        return self.finish_migration(uuid, migration, source, destination)

    def prepare_migration(self, uuid, source, destination, **options):
        migration = str(uuidlib.uuid4())
        info = source.info(uuid)
        endpoint = destination.migration_prepare(
            uuid, migration, {**info['spec'], 'base_id': info['base_id']},
            source.host_info()['migration'], options)
        self.attach(destination, uuid)
        source.migration_begin(uuid, migration, endpoint, options)
        return migration

    def finish_migration(self, uuid, migration, source, destination):
        end = time.monotonic() + base.PATIENCE
        while time.monotonic() < end:
            there = source.migration_status(migration, 5.0)
            if there['ended_at']:
                break
        if there['phase'] != 'completed':
            raise AssertionError(
                f'{there}\n{destination.migration_status(migration)}\n'
                f'{self.logs()}')
        here = base.wait_for(
            lambda: self._ended(destination, migration), 'the destination')
        source.delete(uuid)
        return there, here

    def _ended(self, host, migration):
        status = host.migration_status(migration)
        return status if status['ended_at'] else None

    def logs(self):
        return '\n'.join(
            f'== {host.name} {log.name}\n{log.read_text()[-4000:]}'
            for host in (self.a, self.b)
            for log in (host.log, *(
                host.directory / 'state' / 'logs').glob('*.log')))
