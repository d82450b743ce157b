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

"""A host of the runtime's own for each test: real kernel, real containers.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
import uuid as uuidlib

from nova_pycontainer.runtime import config
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import host
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import process
from tests import cases

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORK = pathlib.Path(os.environ.get(
    'NOVA_PYCONTAINER_WORK', '/var/tmp/nova-pycontainer'))
#: Ends a test that hangs; nothing is measured by it. A machine that is
#: emulated needs more.
PATIENCE = float(os.environ.get('NOVA_PYCONTAINER_PATIENCE', 90.0))
#: The first that busybox's DHCP client does is to take all addresses away.
NO_DHCP = '''
if [ -d /etc/udhcpc ]; then
    until pid=$(cat /run/udhcpc.eth0.pid) && kill $pid; do
        sleep 0.05
    done 2>/dev/null
    while [ -e /proc/$pid ] || pidof default.script; do
        sleep 0.05
    done >/dev/null
fi
'''
MIB = 1 << 20
#: For Python: a filter, seccomp(2), that ends the process for some calls.
FILTER = '''
import ctypes, struct
def forbid(*calls, action=0x80000000):
    libc = ctypes.CDLL(None)
    code = struct.pack("HBBI", 0x20, 0, 0, 0)
    for call in calls:
        code += struct.pack("HBBIHBBI", 0x15, 0, 1, call,
                            6, 0, 0, action)
    code += struct.pack("HBBI", 6, 0, 0, 0x7fff0000)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8,
                          ctypes.addressof(buffer))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program) == 0
'''


def wait_for(condition, what, timeout=PATIENCE):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f'waited {timeout:g} s in vain for {what}')


def ping(address):
    """Wait until a guest on the test's own network answers."""
    wait_for(lambda: subprocess.run(
        ['ping', '-c', '1', '-W', '1', address], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, timeout=30).returncode == 0,
        f'an answer of {address}')


def image(name):
    """Path of the root tarball of one of tools/images' systems."""
    done = subprocess.run(
        [ROOT / 'tools/images/build.sh', name], check=True, text=True,
        stdout=subprocess.PIPE, timeout=1200)
    return pathlib.Path(done.stdout.split()[-1])


def make_file_system(path, mib, *options):
    """A small one in a new file, as the whole disk of a host."""
    path.touch()
    os.truncate(path, mib << 20)
    subprocess.run(['mkfs.ext4', '-q', '-F', *options, str(path)],
                   check=True, timeout=60)


def layer_key(name):
    """The key that all tests give to an image, and its tarball."""
    return key_of(image(name))


def key_of(path):
    """The same, of a tarball whose name tells its contents."""
    return 'sha256-' + hashlib.sha256(path.name.encode()).hexdigest(), path


def limits_io():
    """Whether a controller of this machine limits reads and writes."""
    return pathlib.Path('/run/cgroup1/blkio').exists() or 'io' in (
        pathlib.Path('/sys/fs/cgroup/cgroup.controllers').read_text().split())


def tool(name):
    """The project's own build of crun, runc or criu, else the host's."""
    ours = WORK / 'prefix' / 'bin' / name
    return str(ours) if ours.exists() else name


class HostTestCase(cases.TestCase):
    """A fresh host in directories of its own, removed afterwards."""

    runtime = 'crun'
    disk_limit = 'auto'
    #: More of the configuration.
    options = {}

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest('containers need root; run tools/run_tests.sh')
        if not os.access('/sys/fs/cgroup/cgroup.procs', os.R_OK):
            self.skipTest('no cgroup v2 at /sys/fs/cgroup; run the test '
                          'under tools/lib/in-host.sh')
        base = pathlib.Path(tempfile.mkdtemp(
            prefix='pyc-', dir=WORK if WORK.is_dir() else None))
        self.addCleanup(shutil.rmtree, base)
        base.chmod(0o711)
        # Unpacked once for all tests; a test of the layers has its own.
        shared = (WORK if WORK.is_dir() else base) / 'test-layers'
        shared.mkdir(mode=0o700, exist_ok=True)
        (base / 'state').mkdir(mode=0o711)
        (base / 'state' / 'layers').symlink_to(shared)
        # Unix sockets have short names, so not below the work directory.
        run = pathlib.Path(tempfile.mkdtemp(prefix='pyc-', dir='/run'))
        self.addCleanup(shutil.rmtree, run)
        run.chmod(0o755)
        self.cgroup_parent = (
            f'pyc-test-{os.getpid()}-{uuidlib.uuid4().hex[:6]}')
        self.config = config.Config(
            state_dir=base / 'state', run_dir=run,
            oci_runtime_path=tool(self.runtime), criu_path=tool('criu'),
            cgroup_parent=self.cgroup_parent, disk_limit=self.disk_limit,
            console_port=0, **self.options)
        self.addCleanup(self._remove_cgroups)
        self.addCleanup(self._stop_keeper)
        self.host = self.make_host()
        self.addCleanup(self._delete_all)

    def make_host(self):
        made = host.Host(self.config)
        self.addCleanup(made.close)
        made.start()
        return made

    def _delete_all(self):
        for info in self.host.list():
            self.host.delete(info['uuid'])

    def _stop_keeper(self):
        client = keeper_client.KeeperClient(self.config.keeper_socket)
        try:
            pid = client.ping()['pid']
        except errors.ContainerError:
            return
        pidfd = os.pidfd_open(pid)
        process.send_signal(pidfd, 15)
        if not process.exited(pidfd, 10):
            process.send_signal(pidfd, 9)
            process.exited(pidfd, 10)
        os.close(pidfd)

    def _remove_cgroups(self):
        for parent in pathlib.Path('/sys/fs/cgroup'), *pathlib.Path(
                '/run/cgroup1').glob('*'):
            directory = parent / self.cgroup_parent
            if directory.exists():
                # Only empty ones go; anything else is a leak to be seen.
                directory.rmdir()

    # What most tests do

    def layer(self, name):
        key, path = layer_key(name)
        if not self.host.layer_present(key):
            with open(path, 'rb') as f:
                self.host.layer_import(
                    key, f, image=name, max_bytes=4096 * MIB)
        return key

    def spec(self, image_name='busybox', *, memory=256 * MIB, vcpus=1,
             pids=512, disk=512 * MIB, **more):
        return {
            'name': 'test', 'hostname': 'test', 'image_id': image_name,
            'layer': self.layer(image_name),
            'resources': {'memory_bytes': memory, 'vcpus': vcpus,
                          'pids_max': pids, 'disk_bytes': disk},
            'nics': [], 'config_drive': None, **more}

    def run_container(self, *args, uuid=None, **kwargs):
        uuid = uuid or str(uuidlib.uuid4())
        self.host.define(uuid, self.spec(*args, **kwargs))
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        return uuid

    def state(self, uuid):
        return self.host.info(uuid)['state']

    def sh(self, uuid, script, timeout_s=PATIENCE, check=True):
        done = self.host.exec(
            uuid, ['/bin/sh', '-c', script], timeout_s=timeout_s)
        if check and done.exit_code:
            raise AssertionError(
                f'{script!r} ended with {done.exit_code}: {done.stderr!r}')
        return done.stdout.decode().strip()

    def sh_end(self, uuid, command):
        """Let a guest end itself, which may end the command first."""
        self.sh(uuid, command, check=False)

    def wait_state(self, uuid, *states):
        return wait_for(
            lambda: self.state(uuid) in states and self.state(uuid),
            f'{uuid} to be {states}')

    def wait_console(self, uuid, text):
        wait_for(
            lambda: text.encode() in self.host.console_log(uuid, 1 << 20),
            f'{text!r} on the console')

    def wait_started(self, uuid):
        """Until a busybox has run its start-up script.

        From then on it changes no files. And it takes signals: what is sent
        to the init of a PID namespace before it has asked for any is lost.
        """
        self.wait_console(uuid, 'Start-up done')

    def assert_code(self, code, function, *args, **kwargs):
        error = self.assertRaises(
            errors.ContainerError, function, *args, **kwargs)
        self.assertEqual(code, error.code, str(error))
        return error

    def dhcp_nic(self):
        """An interface with a DHCP server at its other end."""
        ident = uuidlib.uuid4().hex[:11]
        nic = {'id': ident + '-x', 'devname': 'tap' + ident,
               'mac': 'fa:16:3e:00:00:02', 'mtu': 1400, 'tx_offload': False}
        leases = self.config.run_dir / f'leases-{ident}'
        # It binds to the interface when that appears, and stays.
        server = subprocess.Popen(
            ['dnsmasq', '--keep-in-foreground', '--port=0', '--conf-file=',
             '--pid-file=', '--no-ping', '--bind-dynamic',
             f'--interface={nic["devname"]}', '--except-interface=lo',
             '--dhcp-range=203.0.113.10,203.0.113.20,255.255.255.0,1h',
             f'--dhcp-leasefile={leases}'],
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait, 10)
        self.addCleanup(server.terminate)
        return nic

    def give_address(self, nic):
        """Give the outer end the address that the server answers from."""
        subprocess.run(
            ['ip', 'address', 'add', '203.0.113.1/24', 'dev',
             nic['devname']], check=True, timeout=30)

    def traces(self, uuid):
        """What the kernel and the disk still have of a container."""
        found = []
        with open('/proc/self/mountinfo') as f:
            found += [line for line in f if uuid in line]
        for top in (pathlib.Path('/sys/fs/cgroup'),
                    pathlib.Path('/run/cgroup1'), self.config.run_dir,
                    self.config.instances_dir):
            # Which does not mind that a guest of other tests goes meanwhile.
            found += [
                os.path.join(where, name)
                for where, directories, files in os.walk(top)
                for name in directories + files if uuid in name]
        done = subprocess.run(
            ['losetup', '--list', '--noheadings', '--output', 'BACK-FILE'],
            capture_output=True, text=True, timeout=30)
        found += [line for line in done.stdout.splitlines() if uuid in line]
        return found
