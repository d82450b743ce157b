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

"""Control groups: limits, freezing, killing and counting of one container.

Hosts differ: cgroup v2 alone (what users run), or controllers that are bound
to v1 hierarchies beside a v2 hierarchy that has none. The v2 hierarchy always
exists, carries the container's processes, its freezer and ``cgroup.kill``, and
is what the guest sees. A controller is used where the kernel has it.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import errno
import os
import pathlib
import time
import typing as ty

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import procfs

#: Where memory is short, a killed process takes a while to end.
_REMOVE_TIMEOUT = 30.0
#: Seconds after which a freeze is begun anew, and that the guest runs between.
_AGAIN, _STEP = 0.05, 0.01
#: v1 controllers that have another name in v2.
_V2_NAMES: ty.Final = {'blkio': 'io'}
#: Those that OCI runtimes enable for a container, where there are any.
_V2_ENABLED: ty.Final = (
    'cpuset', 'cpu', 'io', 'memory', 'hugetlb', 'pids', 'rdma', 'misc')


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one container; None means that there is none.

    ``cpu_shares`` is Nova's and cgroup v1's unit (1024 is one ordinary CPU);
    times are microseconds, sizes bytes.
    """

    memory_bytes: int | None = None
    #: Of the host's swap, beside the memory.
    swap_bytes: int = 0
    cpu_shares: int | None = None
    cpu_quota_us: int | None = None
    cpu_period_us: int | None = None
    pids_max: int | None = None
    cpus: cpuset.Share = cpuset.Share()
    io: blockio.Limits = blockio.Limits()


#: The kernel's own (Documentation/admin-guide/cgroup-v2.rst, cpu.max).
_CPU_PERIOD_US: ty.Final = 100_000


def _weight(shares: int) -> int:
    """``cpu.weight`` for v1's ``cpu.shares``: 2..262144 on 1..10000, as OCI
    runtimes had it for long. What the source says, whose runtime may have it
    otherwise, is set after it.
    """
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


@dataclasses.dataclass(frozen=True)
class Usage:
    cpu_time_ns: int
    memory_bytes: int
    pids: int
    oom_kills: int


def _read_int(path: pathlib.Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _read_key(path: pathlib.Path, key: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(' ')
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return None


def _read_cpus(file: pathlib.Path) -> cpuset.Cpus | None:
    try:
        return cpuset.parse(file.read_text())
    except (OSError, ValueError):
        return None


def _cpuset(share: cpuset.Share) -> cabc.Iterator[tuple[str, str]]:
    if share.cpus is not None:
        yield 'cpuset.cpus', cpuset.listing(share.cpus)
    if share.nodes is not None:
        yield 'cpuset.mems', cpuset.listing(share.nodes)


class Hierarchies:
    """What this host's kernel offers, read from mountinfo."""

    def __init__(self, mountinfo: str | None = None) -> None:
        if mountinfo is None:
            mountinfo = procfs.text('/proc/self/mountinfo')
        self.v1: dict[str, pathlib.Path] = {}
        v2: list[pathlib.Path] = []
        for line in mountinfo.removesuffix('\n').split('\n'):
            fields, _, rest = line.partition(' - ')
            columns = fields.split(' ')
            point = pathlib.Path(procfs.unescape(columns[4]))
            kind, _, options = rest.split(' ', 2)
            if columns[3] != '/':
                # A bind of a part of the tree: its files are not those of
                # the hierarchy's root.
                continue
            if kind == 'cgroup2':
                v2.append(point)
            elif kind == 'cgroup' and (point / 'cgroup.procs').exists():
                # A mount that another one covers is listed as well: the last
                # that can be seen is the one on top.
                for name in options.split(','):
                    self.v1[name] = point
        if not v2:
            raise errors.ContainerError(
                'unsupported', 'no cgroup v2 hierarchy is mounted',
                remedy='Boot with systemd.unified_cgroup_hierarchy=1, or '
                       'mount cgroup2 at /sys/fs/cgroup')
        default = pathlib.Path('/sys/fs/cgroup')
        self.v2 = default if default in v2 else v2[-1]
        controllers = (self.v2 / 'cgroup.controllers').read_text().split()
        self.v2_controllers = frozenset(controllers)

    @property
    def mode(self) -> str:
        return 'unified' if 'memory' in self.v2_controllers else 'hybrid'

    def legacy(self, controller: str) -> pathlib.Path | None:
        """The v1 hierarchy of a controller that v2 does not have."""
        if _V2_NAMES.get(controller, controller) in self.v2_controllers:
            return None
        return self.v1.get(controller)

    def cpus(self, path: str) -> cpuset.Cpus | None:
        """Those that processes in a cgroup can run on, by the innermost of
        its parents that tells; None: there is no controller for that.
        """
        v1 = self.legacy('cpuset')
        if v1 is None and 'cpuset' not in self.v2_controllers:
            return None
        directory = v1 or self.v2
        file = 'cpuset.effective_cpus' if v1 else 'cpuset.cpus.effective'
        found = _read_cpus(directory / file)
        for name in pathlib.PurePosixPath(path).parts:
            directory = directory / name
            found = _read_cpus(directory / file) or found
        return found

    def missing(self) -> list[str]:
        """Controllers that no hierarchy has: limits that cannot hold."""
        return [name for name in ('cpu', 'cpuset', 'memory', 'pids')
                if name not in self.v2_controllers and name not in self.v1]


class Cgroup:
    """The cgroup of one container, in all hierarchies."""

    #: v1 controllers that are used where v2 lacks them.
    LEGACY = ('memory', 'cpu', 'cpuacct', 'pids', 'blkio', 'cpuset')

    def __init__(self, hierarchies: Hierarchies, path: str) -> None:
        self._h = hierarchies
        self.path = path.strip('/')
        self.v2 = hierarchies.v2 / self.path

    def _legacy(self, controller: str) -> pathlib.Path | None:
        root = self._h.legacy(controller)
        return root / self.path if root else None

    def create_legacy(self, limits: Limits) -> list[pathlib.Path]:
        """Make the v1 cgroups, with limits.

        :returns: the ``cgroup.procs`` files that the process which creates
            the container must enter first: v1 does not move charges later
        """
        procs = self.legacy_procs()
        for file in procs:
            file.parent.mkdir(parents=True, exist_ok=True)
        self._set_legacy_cpuset(limits.cpus)
        self.set_legacy_limits(limits)
        return procs

    def _set_legacy_cpuset(self, share: cpuset.Share) -> None:
        """Give it its CPUs and memory, or what its parents have of them.

        A v1 cpuset takes no process before it has both.
        """
        above = self._h.legacy('cpuset')
        if above is None:
            return
        for name in pathlib.PurePosixPath(self.path).parts:
            below = above / name
            for file in ('cpuset.cpus', 'cpuset.mems'):
                if not (below / file).read_text().strip():
                    (below / file).write_text((above / file).read_text())
            above = below
        for file, value in _cpuset(share):
            (above / file).write_text(value)

    def cpus(self) -> cpuset.Cpus | None:
        """Those that the kernel lets it run on, or None if it runs on any."""
        return self._h.cpus(self.path)

    def legacy_procs(self) -> list[pathlib.Path]:
        """The ``cgroup.procs`` files of the v1 cgroups."""
        return [directory / 'cgroup.procs' for controller in self.LEGACY
                if (directory := self._legacy(controller))]

    def set_legacy_limits(self, limits: Limits) -> None:
        def write(controller: str, name: str, value: int | None) -> None:
            directory = self._legacy(controller)
            if directory is not None and value is not None:
                (directory / name).write_text(str(value))

        memory = self._legacy('memory')
        if memory is not None and limits.memory_bytes is not None:
            # Memory alone is never limited to more than both; a kernel
            # without swap has no such file.
            both = memory / 'memory.memsw.limit_in_bytes'
            if both.exists():
                both.write_text('-1')
            (memory / 'memory.limit_in_bytes').write_text(
                str(limits.memory_bytes))
            if both.exists():
                both.write_text(str(limits.memory_bytes + limits.swap_bytes))
        write('cpu', 'cpu.shares', limits.cpu_shares)
        write('cpu', 'cpu.cfs_period_us', limits.cpu_period_us)
        write('cpu', 'cpu.cfs_quota_us', limits.cpu_quota_us)
        write('pids', 'pids.max', limits.pids_max)

    def create_v2(self, limits: Limits) -> None:
        """Make the v2 cgroup, with limits, as an OCI runtime would.

        A cgroup has the files of a controller only if each one above enables
        it for those below (``cgroup.subtree_control``).

        :raises OSError: a limit cannot be set that this host's kernel has
        """
        above = self._h.v2
        for name in pathlib.PurePosixPath(self.path).parts:
            have = (above / 'cgroup.controllers').read_text().split()
            control = above / 'cgroup.subtree_control'
            enabled = control.read_text().split()
            for controller in _V2_ENABLED:
                if controller in have and controller not in enabled:
                    # One by one: that one is refused is not the others'
                    # concern, and shows where it is needed.
                    with contextlib.suppress(OSError):
                        control.write_text(f'+{controller}')
            above = above / name
            above.mkdir(exist_ok=True)
        for file, value in self._v2_limits(limits):
            (self.v2 / file).write_text(value)

    def _v2_limits(self, limits: Limits) -> cabc.Iterator[tuple[str, str]]:
        have = self._h.v2_controllers
        if 'cpuset' in have:
            yield from _cpuset(limits.cpus)
        if 'memory' in have and limits.memory_bytes is not None:
            yield 'memory.max', str(limits.memory_bytes)
            if (self.v2 / 'memory.swap.max').exists():
                yield 'memory.swap.max', str(limits.swap_bytes)
        if 'pids' in have and limits.pids_max is not None:
            yield 'pids.max', str(limits.pids_max)
        if 'cpu' in have and limits.cpu_quota_us is not None:
            period = limits.cpu_period_us or _CPU_PERIOD_US
            yield 'cpu.max', f'{limits.cpu_quota_us} {period}'
        if 'cpu' in have and limits.cpu_shares is not None:
            yield 'cpu.weight', str(_weight(limits.cpu_shares))

    def limit_io(self, disks: cabc.Iterable[str], limits: Limits) -> None:
        """Set the limits on what is read and written.

        :param disks: see :func:`.blockio.disk_of`
        :raises ContainerError: ``unsupported``: no controller does that
        """
        legacy = self._legacy('blkio')
        for disk in disks:
            if 'io' in self._h.v2_controllers:
                blockio.set_v2(self.v2, disk, limits.io)
            elif legacy is not None:
                blockio.set_v1(legacy, disk, limits.io)
            else:
                raise errors.ContainerError(
                    'unsupported', 'this host has no cgroup controller for '
                    'the limits on disks', remedy='Mount the controller io '
                    '(or blkio), or use a flavor without quota:disk_*')

    def oci_resources(
        self, limits: Limits, disks: list[str]
    ) -> dict[str, object]:
        """The limits that the OCI runtime is to set, on cgroup v2.

        :param disks: see :func:`.blockio.disk_of`

        A runtime refuses a bundle with limits whose controller v2 lacks.
        """
        resources: dict[str, object] = {}
        have = self._h.v2_controllers
        if 'memory' in have and limits.memory_bytes is not None:
            # OCI's swap is memory plus swap.
            resources['memory'] = {
                'limit': limits.memory_bytes,
                'swap': limits.memory_bytes + limits.swap_bytes}
        cpu: dict[str, object] = {}
        if 'cpu' in have:
            cpu |= {'shares': limits.cpu_shares, 'quota': limits.cpu_quota_us,
                    'period': limits.cpu_period_us}
        if 'cpuset' in have:
            cpu |= {file.removeprefix('cpuset.'): value
                    for file, value in _cpuset(limits.cpus)}
        if cpu:
            resources['cpu'] = {
                k: v for k, v in cpu.items() if v is not None}
        if 'pids' in have and limits.pids_max is not None:
            resources['pids'] = {'limit': limits.pids_max}
        if 'io' in have and limits.io and disks:
            resources['blockIO'] = blockio.oci(disks, limits.io)
        return resources

    def exec_procs(self) -> list[pathlib.Path]:
        """Files for a process that enters the container to write itself to.

        A guest's systemd moves its own processes into cgroups below and
        enables controllers for these; then only cgroups without children may
        have processes, and the init's is one.
        """
        # An older agent has not made all of them.
        procs = [file for file in self.legacy_procs() if file.exists()]
        init = self.v2 / 'init.scope' / 'cgroup.procs'
        return [*procs, init if init.exists() else self.v2 / 'cgroup.procs']

    def exists(self) -> bool:
        return self.v2.is_dir()

    def populated(self) -> bool:
        return _read_key(self.v2 / 'cgroup.events', 'populated') == 1

    def processes(self) -> cabc.Iterator[int]:
        """Pids of all processes, also of cgroups that the guest made."""
        for directory, _, _ in os.walk(self.v2):
            try:
                text = pathlib.Path(directory, 'cgroup.procs').read_text()
            except OSError:
                # A threaded cgroup: its processes are those of its parent.
                continue
            yield from map(int, text.split())

    def threads(self) -> cabc.Iterator[str]:
        """The directories in /proc of all threads, see proc_pid_task(5)."""
        for pid in self.processes():
            try:
                for tid in os.listdir(f'/proc/{pid}/task'):
                    yield f'/proc/{pid}/task/{tid}'
            except OSError:
                continue

    def frozen(self) -> bool:
        return _read_key(self.v2 / 'cgroup.events', 'frozen') == 1

    def freeze(self, on: bool, timeout: float = 10.0) -> None:
        """Freeze or thaw all processes, and wait until the kernel says so.

        :raises ContainerError: ``timeout``: a process stays in an
            uninterruptible sleep; the change is taken back
        """
        file = self.v2 / 'cgroup.freeze'
        file.write_text('1' if on else '0')
        deadline = time.monotonic() + timeout
        again = deadline - timeout + _AGAIN
        while self.frozen() != on:
            if on and time.monotonic() > again:
                # Who waits for another process, as for an answer of a FUSE
                # file system, cannot be frozen, and that one is already.
                if any(map(process.uninterruptible, self.threads())):
                    file.write_text('0')
                    time.sleep(_STEP)
                    file.write_text('1')
                again = time.monotonic() + _AGAIN
            if time.monotonic() > deadline:
                file.write_text('0' if on else '1')
                raise errors.ContainerError(
                    'timeout',
                    f'the processes did not {"freeze" if on else "thaw"} '
                    f'within {timeout:.0f} s',
                    remedy='A process of the guest waits for a device or a '
                           'network file system; try again later')
            time.sleep(0.002)

    def kill(self) -> None:
        """Send SIGKILL to every process, however fast they fork."""
        try:
            (self.v2 / 'cgroup.kill').write_text('1')
        except FileNotFoundError:
            pass

    def usage(self) -> Usage:
        cpu = memory = pids = oom = None
        usec = _read_key(self.v2 / 'cpu.stat', 'usage_usec')
        if usec is not None:
            cpu = usec * 1000
        if 'memory' in self._h.v2_controllers:
            memory = _read_int(self.v2 / 'memory.current')
            oom = _read_key(self.v2 / 'memory.events', 'oom_kill')
        elif directory := self._legacy('memory'):
            memory = _read_int(directory / 'memory.usage_in_bytes')
            oom = _read_key(directory / 'memory.oom_control', 'oom_kill')
        if 'pids' in self._h.v2_controllers:
            pids = _read_int(self.v2 / 'pids.current')
        elif directory := self._legacy('pids'):
            pids = _read_int(directory / 'pids.current')
        return Usage(cpu or 0, memory or 0, pids or 0, oom or 0)

    def remove(self) -> None:
        """Remove the cgroups and those that the guest made in them.

        :raises ContainerError: ``timeout``: processes are still in there
        """
        trees = [self.v2]
        trees += [d for c in self.LEGACY if (d := self._legacy(c))]
        deadline = time.monotonic() + _REMOVE_TIMEOUT
        for tree in trees:
            while not _rmtree(tree):
                if time.monotonic() > deadline:
                    raise errors.ContainerError(
                        'timeout', f'the cgroup {tree} stays busy',
                        remedy='Look at the processes in its cgroup.procs')
                time.sleep(0.01)


def _rmtree(top: pathlib.Path) -> bool:
    """rmdir a cgroup and its children. False when one is still busy."""
    for path in _bottom_up(top):
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as e:
            if e.errno in (errno.EBUSY, errno.ENOTEMPTY):
                return False
            raise
    return True


def _bottom_up(top: pathlib.Path) -> cabc.Iterator[pathlib.Path]:
    for directory, _, _ in os.walk(top, topdown=False):
        yield pathlib.Path(directory)


def of_process(pid: int, hierarchies: Hierarchies) -> str:
    """The path of the v2 cgroup that a process is in.

    :raises ProcessLookupError: it is gone
    """
    try:
        lines = procfs.lines(f'/proc/{pid}/cgroup')
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, f'no process {pid}') from None
    for line in lines:
        number, controllers, path = line.split(':', 2)
        if number == '0' and not controllers:
            return path
    raise errors.ContainerError(
        'unsupported', f'process {pid} is in no cgroup v2')
