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

"""The agents of the hosts that the functional tests run."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from nova_pycontainer.agent import client
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import process
from tests.unit.driver import fake_agent

WORK = pathlib.Path(os.environ.get(
    'NOVA_PYCONTAINER_WORK', '/var/tmp/nova-pycontainer'))
ROOT = pathlib.Path(__file__).resolve().parents[2]

#: Ends a test that hangs; nothing is measured by it.
PATIENCE = float(os.environ.get('NOVA_PYCONTAINER_PATIENCE', 60.0))


class InMemory:
    """Agents in memory. What they do not have is a kernel."""

    def __init__(self, **options):
        self._agents = {}

    def setUp(self):
        pass

    def cleanUp(self):
        pass

    def client(self, host):
        return self._agents.setdefault(host, fake_agent.FakeAgent())

    def stop(self, host):
        self.client(host).down = True

    def start(self, host):
        self.client(host).down = False

    def power_off_inside(self, host, uuid):
        self.client(host).guest_powers_off(uuid)

    def imports(self, host):
        """How many images were unpacked."""
        return self.client(host).imports

    def leftovers(self, host):
        """Everything there is of any container."""
        agent = self.client(host)
        return [*agent.containers, *agent.links]


class _Agent:
    """One host: its directories, its agent's process and client.

    :param enter: command line by which its programs run elsewhere
    :param address: where other agents reach it
    """

    def __init__(self, number, enter=(), address='127.0.0.1'):
        self._enter = enter
        self.base = pathlib.Path(tempfile.mkdtemp(
            prefix='pyc-func-', dir=WORK if WORK.is_dir() else None))
        self.base.chmod(0o711)
        # Unix sockets have short names.
        self.run = pathlib.Path(tempfile.mkdtemp(
            prefix='pyc-func-', dir='/run'))
        self.run.chmod(0o755)
        self.log = self.base / 'agent.log'
        self.cgroup_parent = f'pyc-func-{os.getpid()}-{number}'
        self._config = self.base / 'agent.conf'
        self._config.write_text(f"""
[DEFAULT]
debug = true
[pycontainer]
agent_socket = {self.run}/agent.sock
agent_group = root
state_dir = {self.base}/state
run_dir = {self.run}
cgroup_parent = {self.cgroup_parent}
oci_runtime_path = {_tool('crun')}
criu_path = {_tool('criu')}
idmap_base = {0x40000000 + number * (1 << 26)}
idmap_count = 512
console_port = 0
migration_address = {address}
migration_listen = {address}
preflight_at_start = false
""")
        self.client = client.Client(f'{self.run}/agent.sock')
        self._process = None

    def start(self, **env):
        with open(self.log, 'ab') as log:
            self._process = subprocess.Popen(
                [*self._enter, sys.executable, '-m',
                 'nova_pycontainer.cmd.agent',
                 '--config-file', str(self._config)],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.client.host_info()
                return
            except errors.AgentUnavailable:
                if (time.monotonic() > deadline or
                        self._process.poll() is not None):
                    raise AssertionError(
                        'the agent did not start:\n' +
                        self.log.read_text()[-4000:]) from None
            time.sleep(0.05)

    def configure(self, **options):
        """Restart it with other options: of two lines the last one counts."""
        self.kill()
        self.write(**options)
        self.start()

    def write(self, **options):
        with open(self._config, 'a') as f:
            f.writelines(f'{k} = {v}\n' for k, v in options.items())

    def kill(self):
        """As hard as an agent can end; its containers go on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    def died(self):
        return self._process.poll() is not None

    def remove(self):
        try:
            self._end()
        finally:
            shutil.rmtree(self.base)
            shutil.rmtree(self.run)
        # Only empty ones go; anything else is a leak to be seen.
        subprocess.run(
            ['find', '/sys/fs/cgroup', '/run/cgroup1', '-depth',
             '-path', f'*/{self.cgroup_parent}*', '-type', 'd', '-delete'],
            stderr=subprocess.DEVNULL, timeout=PATIENCE)

    def _end(self):
        if self._process is None:
            self.start()
        for info in self.client.list():
            self.client.delete(info['uuid'])
        self._process.terminate()
        self._process.wait(PATIENCE)
        keeper = keeper_client.KeeperClient(self.run / 'keeper.sock')
        pidfd = os.pidfd_open(keeper.ping()['pid'])
        try:
            process.send_signal(pidfd, signal.SIGTERM)
            # It removes its own files, in what is removed next.
            if not process.exited(pidfd, PATIENCE):
                raise AssertionError('the keeper does not end')
        finally:
            os.close(pidfd)

    def leftovers(self):
        found = [info['uuid'] for info in self.client.list()]
        found += [str(path) for path in
                  (self.base / 'state' / 'instances').iterdir()]
        found += [path.name for path in (self.run / 'oci').glob('[!.]*')]
        with open('/proc/self/mounts') as f:
            found += [line for line in f
                      if f'{self.base}/' in line or f'{self.run}/' in line]
        # /sys cannot be read in this process: Nova's tests forbid it.
        found += subprocess.run(
            ['find', '/sys/fs/cgroup', '/run/cgroup1', '-mindepth', '2',
             '-path', f'*/{self.cgroup_parent}/*', '-type', 'd'],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            timeout=PATIENCE).stdout.split()
        return found


class Real:
    """Agents as they are, each in a process of its own.

    :param options: that they all have
    """

    def __init__(self, **options):
        self._options = options
        self._agents = {}

    def setUp(self):
        if not os.access('/sys/fs/cgroup/cgroup.procs', os.R_OK):
            raise AssertionError(
                'no cgroup v2 at /sys/fs/cgroup; run the tests under '
                'tools/lib/in-host.sh')

    def cleanUp(self):
        with contextlib.ExitStack() as all_of_them:
            for agent in self._agents.values():
                all_of_them.callback(agent.remove)

    def _agent(self, host):
        if host not in self._agents:
            agent = self._agents[host] = _Agent(len(self._agents) + 1)
            agent.write(**self._options)
            agent.start()
        return self._agents[host]

    def client(self, host):
        return self._agent(host).client

    def stop(self, host):
        self._agent(host).kill()

    def died(self, host):
        """Whether it has ended by itself."""
        return self._agent(host).died()

    def start(self, host, **env):
        """:param env: more of its environment"""
        self._agent(host).start(**env)

    def configure(self, host, **options):
        self._agent(host).configure(**options)

    def power_off_inside(self, host, uuid):
        agent = self.client(host)
        try:
            agent.exec(uuid, ['/bin/busybox', 'poweroff'])
        except errors.ContainerError:
            # The guest may end before the program does.
            pass
        deadline = time.monotonic() + PATIENCE
        while agent.info(uuid)['state'] != 'stopped':
            if time.monotonic() > deadline:
                raise AssertionError(f'{uuid} does not power off')
            time.sleep(0.05)

    def log(self, host):
        return self._agent(host).log.read_text()

    def directory(self, host):
        return self._agent(host).base

    @staticmethod
    def limits_io():
        """Whether a controller of this machine limits reads and writes."""
        # Not read here: Nova's tests forbid it.
        return not subprocess.run(
            ['sh', '-c', 'test -d /run/cgroup1/blkio || '
             'grep -qw io /sys/fs/cgroup/cgroup.controllers'],
            timeout=PATIENCE).returncode

    def cgroup_says(self, host, uuid, *names):
        """What the files of these names say of a container."""
        parent = self._agent(host).cgroup_parent
        done = subprocess.run(
            ['find', '/sys/fs/cgroup', '/run/cgroup1',
             '-path', f'*/{parent}/{uuid}/*', '(', '-name', names[0],
             *(word for name in names[1:] for word in ('-o', '-name', name)),
             ')', '-exec', 'cat', '{}', ';'],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            timeout=PATIENCE)
        return done.stdout

    def imports(self, host):
        return self.log(host).count(' is layer ')

    def leftovers(self, host):
        links = subprocess.run(
            ['ip', '-brief', 'link'], stdout=subprocess.PIPE, text=True,
            timeout=PATIENCE, check=True).stdout
        return self._agent(host).leftovers() + [
            line for line in links.splitlines()
            if line.startswith(('tap', 'nic', 'gst', 'swt', 'new'))]


def _tool(name):
    """The project's own build of crun or criu, else the host's."""
    ours = WORK / 'prefix' / 'bin' / name
    return str(ours) if ours.exists() else name


def image(name):
    """The root tarball of one of tools/images' systems."""
    done = subprocess.run(
        [ROOT / 'tools/images/build.sh', name], check=True, text=True,
        stdout=subprocess.PIPE, timeout=1200)
    return pathlib.Path(done.stdout.split()[-1]).read_bytes()


#: As root the containers are real.
Agents = Real if os.geteuid() == 0 else InMemory
