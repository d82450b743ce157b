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

"""What in a running guest cannot move, by name, without freezing it.

The kinds of objects that CRIU dumps are those of its ``dump_one_file``
(criu/files.c), ``can_dump_ipproto`` (criu/sk-inet.c), ``get_ns_id``
(criu/namespaces.c) and its table of file systems (criu/filesystems.c).
Nothing here can be complete: what only a dump finds fails the dump, and the
guest goes on.
"""

import collections.abc as cabc
import dataclasses
import errno
import os
import re
import socket
import stat
import typing as ty

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import syscalls
from nova_pycontainer.runtime import volume

#: CRIU's --ghost-limit: files that are open and have no name any more.
GHOST_LIMIT = 64 << 20
#: A guest with more wrong with it than this is told about this much.
_MAX_PROBLEMS = 50

_COLD = 'or migrate the server cold'

#: CRIU dumps these within each other, and no others.
_NESTABLE = frozenset(['mnt', 'net'])
_NAMESPACES = ('cgroup', 'ipc', 'mnt', 'net', 'pid', 'pid_for_children',
               'time', 'time_for_children', 'user', 'uts')

_ANON = frozenset([
    '[eventfd]', '[eventpoll]', 'inotify', '[inotify]', '[fanotify]',
    '[signalfd]', '[timerfd]', '[pidfd]'])
_ANON_NAMES = {
    '[io_uring]': ('io_uring', 'an io_uring'),
    '[userfaultfd]': ('userfaultfd', 'a userfaultfd'),
    '[perf_event]': ('perf-event', 'a performance counter'),
    'seccomp notify': ('seccomp-notify', 'a seccomp listener'),
    '[landlock-ruleset]': ('landlock', 'a Landlock rule set'),
    '[fscontext]': ('mount-context', 'a file system that is being mounted'),
}

_FAMILIES = frozenset([
    socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK,
    socket.AF_PACKET])
_PROTOCOLS = frozenset([
    0, socket.IPPROTO_TCP, socket.IPPROTO_UDP, 136,  # UDP-Lite
    socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6])
_MPTCP = 262

#: Character devices by their major numbers: memory, terminals.
_MAJORS = frozenset([1, 4, 5, *range(136, 144)])
_MEMORY, _MISC = 1, 10
_TUN, _AUTOFS = 200, 235

_FILE_SYSTEMS = frozenset([
    'autofs', 'binfmt_misc', 'btrfs', 'cgroup', 'cgroup2', 'devpts',
    'devtmpfs', 'mqueue', 'overlay', 'proc', 'pstore', 'ramfs',
    'securityfs', 'sysfs', 'tmpfs', 'debugfs', 'tracefs'])
#: Asking these for a file may ask a process of the guest's.
_REMOTE = ('fuse', 'nfs', 'cifs', '9p', 'ceph', 'smb')


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that keeps a guest or a host from a migration."""

    name: str
    reason: str
    remedy: str
    #: As the guest sees it: ``name (pid)``.
    process: str | None = None

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


class _Process:
    """A process of the guest's. Any of its files may be gone at any time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.directory = f'/proc/{pid}'
        self.status = dict(
            line.split(':', 1)
            for line in procfs.lines(f'{self.directory}/status')
            if ':' in line)
        comm = self.status['Name'].strip()
        self.inner = int(self.status['NSpid'].split()[-1])
        printable = ''.join(c if c.isprintable() else '?' for c in comm)
        self.title = f'{printable} (pid {self.inner})'

    def number(self, name: str) -> int:
        return int(self.status.get(name, '0').split()[-1])

    def namespaces(self) -> dict[str, str]:
        found = {}
        for name in _NAMESPACES:
            try:
                found[name] = os.readlink(f'{self.directory}/ns/{name}')
            except OSError:
                # time is of Linux 5.6; pid_for_children is empty until the
                # first child.
                continue
        return found


def _title(pid: int) -> str:
    try:
        return _Process(pid).title
    except OSError:
        return 'another process'


def _outside(pid: int) -> bool:
    """Whether it is in the host's PID namespace: what enters a container
    waits there for its child.
    """
    try:
        return len(process.numbers(pid)) == 1
    except OSError:
        return True


class Inspection:
    """One look at one container."""

    def __init__(
        self, init: int, group: cgroup.Cgroup, nodes: volume.Nodes
    ) -> None:
        self._init = init
        self._group = group
        self._nodes = nodes
        self.problems: list[Problem] = []
        #: Files of lxcfs that the guest has, of :data:`.lxcfs.FILES`.
        self.shares: list[str] = []
        #: Whether it has /dev/fuse.
        self.fuse = False
        self.processes = 0
        self.threads = 0

    def run(self) -> None:
        pids = set(self._group.processes())
        inside = {p for p in pids if not _outside(p)}
        self._seen_mounts: set[str] = set()
        init = _Process(self._init)
        own = init.namespaces()
        for pid in sorted(inside, key=lambda p: (p != self._init, p)):
            if len(self.problems) >= _MAX_PROBLEMS:
                return
            try:
                process = _Process(pid)
                if process.status['State'].split()[0] in 'ZX':
                    continue
                self.processes += 1
                self.threads += process.number('Threads')
                if not self._tree(process, inside):
                    continue
                self._namespaces(process, own)
                self._mounts(process, own)
                self._memory(process)
                self._files(process)
            except OSError as e:
                # It has ended meanwhile. That its mounts cannot be told then
                # is EINVAL (fs/proc_namespace.c, mounts_open_common).
                if e.errno not in (
                        errno.ENOENT, errno.ESRCH, errno.EINVAL):
                    raise

    def _add(self, name: str, process: _Process | None, reason: str,
             remedy: str) -> None:
        problem = Problem(
            name, errors.printable(reason), remedy,
            process.title if process else None)
        if problem not in self.problems:
            self.problems.append(problem)

    # Where it comes from

    def _tree(self, process: _Process, inside: cabc.Set[int]) -> bool:
        """:returns: whether it is of the guest's own"""
        if process.pid != self._init and (
                process.number('PPid') not in inside):
            self._add(
                'outside-parent', process, 'it was started from the host '
                '("pycontainer exec") and is not below the guest\'s init, '
                'so it would not move', 'Let it end')
            return False
        if process.status.get('NSsid', '1').split()[-1] == '0':
            self._add(
                'outside-session', process, 'the leader of its session is '
                'not in the guest', 'Stop it, or start it by the guest\'s '
                'own service manager')
        tracer = process.number('TracerPid')
        if tracer:
            self._add(
                'traced', process, 'it is being traced by '
                f'{_title(tracer)}, and CRIU has to trace it itself',
                'End strace, gdb or whatever traces it')
        return True

    def _namespaces(
        self, process: _Process, own: cabc.Mapping[str, str]
    ) -> None:
        theirs = process.namespaces()
        for name, link in theirs.items():
            kind = name.removesuffix('_for_children')
            if kind in _NESTABLE or own.get(name, link) == link:
                continue
            if name != kind and theirs.get(kind) != own.get(kind):
                # Said already.
                continue
            self._add(
                f'nested-{kind}-namespace', process,
                f'it is in {"an" if kind == "ipc" else "a"} {kind} '
                'namespace of its own, which CRIU cannot dump',
                f'Stop it {_COLD}; without pycontainer:nesting in the '
                'flavor or the image a guest makes no such namespaces')

    def _mounts(
        self, process: _Process, own: cabc.Mapping[str, str]
    ) -> None:
        namespace = process.namespaces().get('mnt', '')
        if namespace in self._seen_mounts:
            return
        self._seen_mounts.add(namespace)
        nested = namespace != own.get('mnt')
        where = process if nested else None
        known: cabc.Mapping[str, str] = {}
        try:
            known = guest.external_mounts(process.pid, self._nodes)
        except errors.ContainerError as e:
            self._add('mount', where, e.message, e.remedy or '')
        if not nested:
            self.shares = guest.shares_of(known)
            self.fuse = guest.FUSE in known.values()
        for mount in guest.mounts(process.pid):
            if mount.point not in known and (
                    mount.fstype not in _FILE_SYSTEMS):
                self._add(
                    'mount', where, f'{mount.point} is a {mount.fstype} '
                    'file system, which CRIU cannot dump',
                    f'Unmount it in the guest, {_COLD}')

    # Memory

    def _memory(self, process: _Process) -> None:
        if int(process.status.get('HugetlbPages', '0').split()[0]):
            self._add(
                'hugetlb', process, 'it uses huge pages of the host, which '
                'need not be free on another one',
                f'Let it use ordinary memory, {_COLD}')
        for line in procfs.lines(f'{process.directory}/maps'):
            fields = line.split(None, 5)
            if len(fields) < 6:
                continue
            if fields[5].startswith('anon_inode:'):
                if '[aio]' not in fields[5]:
                    self._anon(process, fields[5])
            elif fields[5].startswith('/dev/'):
                self._device_memory(process, fields[0], fields[5])

    def _device_memory(
        self, process: _Process, area: str, path: str
    ) -> None:
        try:
            status = os.stat(f'{process.directory}/map_files/{area}')
        except OSError:
            return
        if stat.S_ISCHR(status.st_mode) and (
                os.major(status.st_rdev) != _MEMORY):
            self._add(
                'device', process, f'it has {path} in its memory',
                f'Stop it, {_COLD}')

    # Files

    def _files(self, process: _Process) -> None:
        pidfd = os.pidfd_open(process.pid)
        try:
            remote = self._remote_mounts(process.pid)
            for number in os.listdir(f'{process.directory}/fd'):
                try:
                    link = os.readlink(f'{process.directory}/fd/{number}')
                    if link.startswith('anon_inode:'):
                        self._anon(process, link)
                    elif link.startswith('socket:'):
                        self._socket(process, pidfd, int(number))
                    elif link.startswith('/dmabuf:') or (
                            link.startswith('/secretmem')):
                        self._add(
                            'memory-object', process, f'it has {link} open',
                            f'Stop it, {_COLD}')
                    elif link.startswith('/'):
                        self._file(process, number, link, remote)
                except OSError:
                    # Closed meanwhile.
                    continue
        finally:
            os.close(pidfd)

    @staticmethod
    def _remote_mounts(pid: int) -> frozenset[int]:
        return frozenset(
            m.id for m in guest.mounts(pid)
            if m.fstype.startswith(_REMOTE))

    def _anon(self, process: _Process, link: str) -> None:
        kind = link.removeprefix('anon_inode:')
        if kind in _ANON:
            return
        if kind.startswith(('bpf', 'btf')):
            name, title = 'bpf', 'a BPF program or map'
        else:
            name, title = _ANON_NAMES.get(kind, ('anon-inode', kind))
        self._add(
            name, process, f'it has {title} open, which CRIU cannot dump',
            f'Stop it, or configure it to do without, {_COLD}')

    def _socket(self, process: _Process, pidfd: int, number: int) -> None:
        copy = syscalls.pidfd_getfd(pidfd, number)
        with socket.socket(fileno=copy) as sock:
            family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
            kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            protocol = sock.getsockopt(
                socket.SOL_SOCKET, socket.SO_PROTOCOL)
        if family not in _FAMILIES:
            try:
                title = socket.AddressFamily(family).name
            except ValueError:
                title = f'family {family}'
            self._add(
                'socket-family', process, f'it has a socket of {title}, '
                'which CRIU cannot dump', f'Stop it, {_COLD}')
        elif family in (socket.AF_INET, socket.AF_INET6) and (
                kind != socket.SOCK_RAW and protocol not in _PROTOCOLS):
            title = {_MPTCP: 'Multipath TCP', 132: 'SCTP'}.get(
                protocol, f'protocol {protocol}')
            self._add(
                'socket-protocol', process, f'it has a socket of {title}, '
                'which CRIU cannot dump',
                'Set GODEBUG=multipathtcp=0 if it is written in Go, or '
                'net.mptcp.enabled=0 in the guest, and restart it'
                if protocol == _MPTCP else f'Stop it, {_COLD}')

    def _file(
        self, process: _Process, number: str, link: str,
        remote: cabc.Set[int],
    ) -> None:
        if link.removeprefix('/') in self.shares:
            self._share(process, number, link)
        if not link.startswith('/dev/') and not link.endswith(' (deleted)'):
            return
        found = re.search(
            r'^mnt_id:\s*(\d+)$',
            procfs.text(f'{process.directory}/fdinfo/{number}'), re.M)
        if found is None or int(found[1]) in remote:
            return
        status = os.stat(f'{process.directory}/fd/{number}')
        if stat.S_ISBLK(status.st_mode):
            self._device(process, link, status)
        elif stat.S_ISCHR(status.st_mode):
            major, minor = (os.major(status.st_rdev),
                            os.minor(status.st_rdev))
            if major not in _MAJORS and (major, minor) not in (
                    (_MISC, _TUN), (_MISC, _AUTOFS)):
                self._device(process, link, status)
        elif (stat.S_ISREG(status.st_mode) and status.st_nlink == 0 and
              not link.startswith(('/memfd:', '/SYSV')) and
              status.st_blocks * 512 > GHOST_LIMIT):
            self._add(
                'deleted-file', process, f'it holds {link} open, a file of '
                f'{status.st_blocks * 512 >> 20} MiB without a name; at '
                f'most {GHOST_LIMIT >> 20} MiB can move',
                f'Let it open the file anew, or restart it, {_COLD}')

    def _share(self, process: _Process, number: str, link: str) -> None:
        try:
            os.stat(f'{process.directory}/fd/{number}')
        except OSError as e:
            if e.errno == errno.ENOTCONN:
                self._add(
                    'lxcfs', process, f'it has {link} open, of an lxcfs of '
                    'the host that has ended', f'Stop it, {_COLD}')

    def _device(
        self, process: _Process, link: str, status: os.stat_result
    ) -> None:
        self._add(
            'device', process, f'it has the device {link} '
            f'({os.major(status.st_rdev)}:{os.minor(status.st_rdev)}) open, '
            'which CRIU cannot dump', f'Stop it, {_COLD}')
