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

"""What the benchmarks share: a host of the runtime's own, memory figures,
tables. Sizes are bytes, times seconds.
"""

import argparse
import collections.abc as cabc
import contextlib
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import typing as ty
import uuid as uuidlib

import prettytable

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import host as rhost
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import process

REPO = pathlib.Path(__file__).resolve().parents[2]
WORK = pathlib.Path(os.environ.get('NOVA_PYCONTAINER_WORK') or
                    '/var/tmp/nova-pycontainer')
MIB = 1 << 20
KIB = 1 << 10
PAGE = os.sysconf('SC_PAGE_SIZE')
#: What the kernel takes for each thread (x86-64, arm64: THREAD_SIZE).
THREAD_STACK = 16 * KIB


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=(description or '').strip().partition('\n')[0])
    made.add_argument('--json', type=pathlib.Path, metavar='PATH',
                      help='write the figures there, too')
    return made


def inside_host() -> None:
    """Go on in namespaces of our own: see tools/lib/in-host.sh."""
    if os.environ.pop('PYCONTAINER_BENCHMARK', None) == 'inside':
        return
    if os.geteuid() != 0:
        sys.exit('needs root')
    script = str(REPO / 'tools/lib/in-host.sh')
    os.environ['PYCONTAINER_BENCHMARK'] = 'inside'
    # "python -m" puts the module's path into argv[0].
    os.execv(script, [script, sys.executable, *sys.orig_argv[1:]])


def image(name: str) -> pathlib.Path:
    """The root tarball of one of tools/images' systems."""
    done = subprocess.run(
        [REPO / 'tools/images/build.sh', name], check=True, text=True,
        stdout=subprocess.PIPE, timeout=1800)
    return pathlib.Path(done.stdout.split()[-1])


def tool(name: str) -> str:
    ours = WORK / 'prefix' / 'bin' / name
    return str(ours) if ours.exists() else name


def machine() -> dict[str, ty.Any]:
    """What the figures were measured on."""
    meminfo = read_keys('/proc/meminfo')
    model = ''
    with open('/proc/cpuinfo') as f:
        for line in f:
            if line.startswith('model name'):
                model = line.partition(':')[2].strip()
                break
    return {'cpus': os.cpu_count(), 'cpu': model,
            'memory_bytes': meminfo['MemTotal'],
            'kernel': platform.release(),
            'load': os.getloadavg()[0]}


def describe_machine() -> str:
    found = machine()
    return (f'{found["cpus"]} CPUs ({found["cpu"]}), '
            f'{found["memory_bytes"] / (1 << 30):.0f} GiB, '
            f'kernel {found["kernel"]}, load {found["load"]:.1f}')


def read_keys(path: str | os.PathLike[str]) -> dict[str, int]:
    """A file of "key value [kB]" lines, as bytes where it says kB."""
    found = {}
    with open(path) as f:
        for line in f:
            match = re.match(r'([^:\s]+):?\s+(\d+)(\s+kB)?\s*$', line)
            if match:
                found[match[1]] = int(match[2]) * (KIB if match[3] else 1)
    return found


# Memory

#: Lines of /proc/meminfo that are the kernel's own memory. The reclaimable
#: part of the slab is the cache of names and inodes: it is given back when
#: somebody needs memory, so it is shown apart.
KERNEL_LINES = {
    'slab, unreclaimable': 'SUnreclaim',
    'per-CPU memory': 'Percpu',
    'vmalloc': 'VmallocUsed',
    'slab, reclaimable': 'SReclaimable',
}


def kernel_memory() -> dict[str, int]:
    """The kernel's own memory, less stacks and page tables.

    Those belong to processes, and are read from them.
    """
    meminfo = read_keys('/proc/meminfo')
    found = {name: meminfo.get(key, 0) for name, key in KERNEL_LINES.items()}
    # It holds the kernel stacks, too (CONFIG_VMAP_STACK).
    found['vmalloc'] = max(0, found['vmalloc'] - meminfo['KernelStack'])
    return found


def slab_of_a_process(count: int = 200) -> float:
    """Unreclaimable slab that the smallest process takes, by measurement.

    Its task, its address space, its signals, its open files: they would be
    there, too, if it ran outside a container.
    """
    before = read_keys('/proc/meminfo')['SUnreclaim']
    started = [subprocess.Popen(['busybox', 'sleep', '600'],
                                stdin=subprocess.DEVNULL)
               for _ in range(count)]
    try:
        time.sleep(1)
        after = read_keys('/proc/meminfo')['SUnreclaim']
    finally:
        for child in started:
            child.kill()
        for child in started:
            child.wait(30)
    return (after - before) / count


def private_memory(pid: int) -> int:
    """What would be free if this process were not: its unique set size."""
    found = read_keys(f'/proc/{pid}/smaps_rollup')
    return found['Private_Clean'] + found['Private_Dirty']


def slab_caches() -> dict[str, int]:
    """Bytes of each slab cache of the kernel, as slabs of whole pages."""
    found = {}
    with open('/proc/slabinfo') as f:
        for line in f:
            fields = line.split()
            if fields[0] in ('slabinfo', '#') or len(fields) < 15:
                continue
            found[fields[0]] = int(fields[14]) * int(fields[5]) * PAGE
    return found


class GuestMemory(ty.NamedTuple):
    """Memory charged to one container, and what of it processes explain."""

    anonymous: int
    page_cache: int
    kernel: int
    #: Stacks and page tables of its processes: part of ``kernel``.
    process_kernel: int
    processes: int


def guest_memory(cgroup: str) -> GuestMemory:
    """What is charged to a container's control group.

    :param cgroup: its path below the hierarchy's root
    """
    v2 = pathlib.Path('/sys/fs/cgroup') / cgroup
    legacy = pathlib.Path('/run/cgroup1/memory') / cgroup
    if (v2 / 'memory.stat').exists():
        stat = read_keys(v2 / 'memory.stat')
        anonymous, cache = stat['anon'], stat['file']
        kernel = stat['kernel']
    else:
        stat = read_keys(legacy / 'memory.stat')
        anonymous, cache = stat['total_rss'], stat['total_cache']
        kernel = int((legacy / 'memory.kmem.usage_in_bytes').read_text())
    of_processes = count = 0
    for procs in [v2 / 'cgroup.procs', *v2.rglob('*/cgroup.procs')]:
        for pid in procs.read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                status = read_keys(f'/proc/{pid}/status')
                of_processes += (status.get('VmPTE', 0) +
                                 status['Threads'] * THREAD_STACK)
                count += 1
    return GuestMemory(anonymous, cache, kernel, of_processes, count)


@contextlib.contextmanager
def inotify_instances(wanted: int) -> cabc.Iterator[int]:
    """Let root's user namespaces have at least so many inotify instances.

    The kernel charges what a container uses to the owner of its user
    namespace, too: all of them together to root, whose limit is 128 by
    default. One systemd takes about eight.

    :yields: the limit that there was
    """
    path = pathlib.Path('/proc/sys/fs/inotify/max_user_instances')
    had = int(path.read_text())
    if had < wanted:
        path.write_text(str(wanted))
    try:
        yield had
    finally:
        if had < wanted:
            path.write_text(str(had))


# A host

class Bench:
    """A host of the runtime alone, removed at the end.

    Use in ``inside_host()``.
    """

    def __init__(self, disk_limit: str = 'auto') -> None:
        self._stack = contextlib.ExitStack()
        state = pathlib.Path(tempfile.mkdtemp(
            prefix='bench-', dir=WORK if WORK.is_dir() else None))
        self._stack.callback(shutil.rmtree, state)
        state.chmod(0o711)
        run = pathlib.Path(tempfile.mkdtemp(prefix='bench-', dir='/run'))
        self._stack.callback(shutil.rmtree, run)
        run.chmod(0o755)
        self.parent = f'pyc-bench-{os.getpid()}'
        self._stack.callback(self._remove_cgroups)
        self.config = rconfig.Config(
            state_dir=state, run_dir=run, oci_runtime_path=tool('crun'),
            criu_path=tool('criu'), cgroup_parent=self.parent,
            disk_limit=disk_limit, idmap_count=4096, console_port=0)
        self.host = rhost.Host(self.config)
        self.host.start()
        self._stack.callback(self.host.close)
        self._stack.callback(self._stop_keeper)
        self._stack.callback(self._delete_all)

    def __enter__(self) -> 'Bench':
        return self

    def __exit__(self, *args: ty.Any) -> None:
        self._stack.close()

    def _delete_all(self) -> None:
        for info in self.host.list():
            self.host.delete(info['uuid'])

    def keeper_pid(self) -> int:
        return int(keeper_client.KeeperClient(
            self.config.keeper_socket).ping()['pid'])

    def _stop_keeper(self) -> None:
        with contextlib.suppress(errors.ContainerError):
            pidfd = os.pidfd_open(self.keeper_pid())
            process.send_signal(pidfd, 15)
            process.exited(pidfd, 10)
            os.close(pidfd)

    def _remove_cgroups(self) -> None:
        for top in (pathlib.Path('/sys/fs/cgroup'),
                    *pathlib.Path('/run/cgroup1').glob('*')):
            directory = top / self.parent
            if directory.exists():
                directory.rmdir()

    def layer(self, name: str) -> str:
        key = f'sha256-{name}'.ljust(40, '0')
        if not self.host.layer_present(key):
            with open(image(name), 'rb') as stream:
                self.host.layer_import(
                    key, stream, image=name, max_bytes=8 << 30)
        return key

    def spec(self, image_name: str, **more: ty.Any) -> dict[str, ty.Any]:
        port = str(uuidlib.uuid4())
        tail = uuidlib.uuid4().bytes[:3]
        mac = ':'.join(f'{byte:02x}' for byte in (0xfa, 0x16, 0x3e, *tail))
        return {
            'name': 'bench', 'hostname': 'bench', 'image_id': image_name,
            'layer': self.layer(image_name),
            'resources': {'memory_bytes': 512 * MIB, 'vcpus': 1,
                          'pids_max': 1024, 'disk_bytes': 1024 * MIB},
            'nics': [{'id': port, 'devname': f'tap{port[:11]}', 'mac': mac,
                      'mtu': 1442, 'tx_offload': True}],
            'config_drive': None, **more}

    def create(self, spec: dict[str, ty.Any]) -> str:
        uuid = str(uuidlib.uuid4())
        self.host.plug(uuid, spec['nics'])
        self.host.define(uuid, spec)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        return uuid

    def wait_idle(self, uuids: cabc.Sequence[str], *, quiet: float = 5.0,
                  timeout: float = 600.0) -> float:
        """Wait until all of them together use next to no CPU.

        :returns: how long that took
        """
        begin = time.monotonic()
        used = self._cpu_time(uuids)
        while True:
            time.sleep(quiet)
            now = self._cpu_time(uuids)
            # 1 % of one CPU for all, or 0.05 % for each.
            limit = max(0.01, 0.0005 * len(uuids)) * quiet
            if now - used < limit:
                return time.monotonic() - begin
            if time.monotonic() - begin > timeout:
                raise TimeoutError(
                    f'after {timeout:.0f} s the instances still use '
                    f'{(now - used) / quiet * 100:.1f} % of a CPU')
            used = now

    def _cpu_time(self, uuids: cabc.Sequence[str]) -> float:
        return sum(int(self.host.info(uuid)['cpu_time_ns'])
                   for uuid in uuids) / 1e9


# Figures

def spread(values: cabc.Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {'median': statistics.median(values), 'min': min(values),
            'max': max(values), 'n': len(values)}


def table(titles: cabc.Sequence[str],
          rows: cabc.Iterable[cabc.Sequence[ty.Any]]) -> str:
    made = prettytable.PrettyTable(list(titles))
    made.align = 'r'
    made.align[titles[0]] = 'l'
    for row in rows:
        made.add_row(list(row))
    return str(made)


def write_json(path: pathlib.Path | None, data: dict[str, ty.Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(
            {'machine': machine(), **data}, indent=2) + '\n')
