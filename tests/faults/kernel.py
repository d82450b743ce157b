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


"""What the kernel says of two hosts. Nothing here asks an agent.
"""

import collections
import contextlib
import os
import pathlib
import time

_PROC = pathlib.Path('/proc')
#: Hierarchies, as tools/lib/in-host.sh arranges them.
_V2 = pathlib.Path('/sys/fs/cgroup')
_V1 = pathlib.Path('/run/cgroup1')
#: Directories of an agent for all instances, made when they are needed.
_KEPT = {f'/run/pyc/{name}' for name in (
    'bundle', 'console', 'migration', 'oci', 'root')}
_SYSCTLS = ('vm/unprivileged_userfaultfd', 'fs/pipe-max-size')


def _read(path):
    try:
        return path.read_text(errors='replace')
    except OSError:
        return ''


def _stat(pid):
    """State, parent and start time of a process; None: it is gone."""
    text = _read(_PROC / str(pid) / 'stat')
    if not text:
        return None
    fields = text[text.rindex(')') + 2:].split()
    return fields[0], int(fields[1]), int(fields[19])


def _pids():
    return [int(name) for name in os.listdir(_PROC) if name.isdigit()]


def command(pid):
    return _read(_PROC / str(pid) / 'cmdline').replace('\0', ' ').strip()


def in_pid_namespace(pid):
    """The numbers of a process, the outermost first."""
    for line in _read(_PROC / str(pid) / 'status').splitlines():
        if line.startswith('NSpid:'):
            return [int(n) for n in line.split()[1:]]
    return []


def processes(host):
    """All living processes of a host: of its namespaces, of its cgroups, and
    what descends from them.

    :returns: pid → (state, start time)
    """
    mine = os.readlink(f'/proc/{host.pid}/ns/mnt')
    facts = {pid: stat for pid in _pids() if (stat := _stat(pid))}
    found = set()
    for pid in facts:
        with contextlib.suppress(OSError):
            if (os.readlink(_PROC / str(pid) / 'ns/mnt') == mine or
                    f'/{host.cgroup_parent}/' in _read(
                        _PROC / str(pid) / 'cgroup')):
                found.add(pid)
    # Also what has left both.
    grown = True
    while grown:
        more = {pid for pid, (_, parent, _) in facts.items()
                if parent in found} - found
        found |= more
        grown = bool(more)
    found.discard(host.pid)
    return {pid: (facts[pid][0], facts[pid][2]) for pid in found
            if facts[pid][0] not in 'ZX'}


def _is(pid, program):
    """Whether a process executes a program; its title may say something
    else, and the program may be a copy of itself.
    """
    with contextlib.suppress(OSError):
        if os.path.basename(os.readlink(
                _PROC / str(pid) / 'exe')).startswith(program):
            return True
    return os.path.basename(command(pid).split(' ')[0]) == program


def programs(host, program, *words, without='', after=0):
    """Processes of the host itself that execute a program.

    :param words: of their commands
    :param without: not in their commands
    :param after: only those with a higher number, which is quickly done
    """
    mine = os.readlink(f'/proc/{host.pid}/ns/mnt')
    # CRIU enters the guest's namespaces.
    descendants = set() if after else set(processes(host))
    found = []
    for pid in _pids():
        if pid <= after or not _is(pid, program):
            continue
        text = command(pid)
        with contextlib.suppress(OSError):
            if (all(word in text for word in words) and
                    not (without and without in text) and
                    (os.readlink(_PROC / str(pid) / 'ns/mnt') == mine or
                     pid in descendants) and
                    len(in_pid_namespace(pid)) == 1):
                found.append(pid)
    return found


def last_pid():
    """The number of the youngest process."""
    return int(_read(_PROC / 'loadavg').split()[-1])


def _has_open(pid, word):
    """Whether a process has a file open with a word in its path."""
    with contextlib.suppress(OSError):
        for fd in (_PROC / str(pid) / 'fd').iterdir():
            with contextlib.suppress(OSError):
                if word in os.readlink(fd):
                    return True
    return False


def _is_init(pid):
    """Whether it is the living init of a PID namespace below ours."""
    return (in_pid_namespace(pid)[1:] == [1] and
            (_stat(pid) or 'Z')[0] not in 'ZX')


def inits_of(uuid):
    """Pids of the inits of a guest, on whichever host."""
    return [pid for pid in _pids()
            if uuid in _read(_PROC / str(pid) / 'cgroup') and _is_init(pid)]


def hosts_of(uuid):
    """The cgroup parents of the hosts on which a guest has an init."""
    return {path.split('/')[1] for pid in inits_of(uuid)
            for line in _read(_PROC / str(pid) / 'cgroup').splitlines()
            if uuid in (path := line.split(':', 2)[2])}


class Copy:
    """One copy of the guest on a host, as the kernel has it.

    :ivar inits: pids of the inits of its PID namespaces
    :ivar frozen: the whole copy is frozen
    """

    def __init__(self, host, uuid):
        self._host = host
        self._uuid = uuid
        # As the host sees it; nothing of it is left when its power is off.
        self._cgroup = pathlib.Path(
            f'/proc/{host.pid}/root{_V2}', host.cgroup_parent, uuid)
        # Of os.walk(), since cgroups may go meanwhile.
        self.pids = {int(pid) for path, _, _ in os.walk(self._cgroup)
                     for pid in _read(
                         pathlib.Path(path, 'cgroup.procs')).split()}
        # An init that has left its cgroup would be a copy as well.
        candidates = self.pids | {
            pid for pid in processes(host) if uuid in _read(
                _PROC / str(pid) / 'cgroup')}
        self.inits = [pid for pid in candidates if _is_init(pid)]
        self.frozen = 'frozen 1' in _read(self._cgroup / 'cgroup.events')

    def commands(self):
        return [command(pid) for pid in self.pids]

    def doing(self, start):
        """What those do whose command starts so: by state, system call, and
        where in the kernel.
        """
        return [' '.join(_read(_PROC / str(pid) / name).strip()
                         for name in ('stat', 'syscall', 'wchan', 'stack'))
                for pid in self.pids if command(pid).startswith(start)]

    def holds(self, start, lock):
        """Whether one of those whose command starts so holds a lock.

        :param lock: kind, first and last byte, as in proc(5)
        """
        return any(
            line.startswith('lock:') and line.split()[-5] == lock[0] and
            line.split()[-2:] == list(lock[1:])
            for pid in self.pids if command(pid).startswith(start)
            for file in (_PROC / str(pid) / 'fdinfo').iterdir()
            for line in _read(file).splitlines())

    def _switches(self):
        total = 0
        for pid in self.pids:
            for line in _read(_PROC / str(pid) / 'status').splitlines():
                if 'ctxt_switches' in line:
                    total += int(line.split()[1])
        return total

    def _is_made(self):
        """Whether CRIU has not yet restored it.

        Its init then is younger than its CRIU, which has files of the instance
        open, and ends before the guest may run; what runs in it before that is
        CRIU's own code, whatever its executable is called.
        """
        for pid in self.inits:
            with contextlib.suppress(OSError):
                if os.path.basename(os.readlink(
                        _PROC / str(pid) / 'exe')) == 'criu':
                    return True
        started = [stat[2] for pid in self.inits if (stat := _stat(pid))]
        return any(
            (stat := _stat(pid)) and stat[2] <= max(started, default=0)
            for pid in programs(self._host, 'criu', without='lazy-pages')
            if _has_open(pid, self._uuid))

    def runs(self, seconds=0.4):
        """Whether the scheduler gives it a processor."""
        if not self.inits or self.frozen or self._is_made():
            return False
        before = self._switches()
        time.sleep(seconds)
        return self._switches() != before and not self._is_made()

    def __str__(self):
        return (f'{len(self.inits)} init(s), {len(self.pids)} processes'
                f'{", frozen" if self.frozen else ""}')


def oom_kills(host, uuid):
    """How many processes of an instance the kernel has killed for lack of
    memory.
    """
    for path in (
            _V1 / 'memory' / host.cgroup_parent / uuid / 'memory.oom_control',
            _V2 / host.cgroup_parent / uuid / 'memory.events'):
        for line in _read(path).splitlines():
            if line.startswith('oom_kill '):
                return int(line.split()[1])
    return 0


def where_it_runs(hosts, host, uuid, timeout=10.0):
    """Where a guest runs, which it should on one host.

    The scheduler may be late with it.

    :returns: the names of the hosts that it runs on, in the end
    """
    deadline = time.monotonic() + timeout
    while True:
        found = running(hosts, uuid)
        if len(found) > 1 or found == [host.name] or (
                time.monotonic() > deadline):
            return found


def running(hosts, uuid):
    """Names of the hosts that run the guest."""
    return [h.name for h in hosts if Copy(h, uuid).runs()]


def alive(hosts, uuid):
    """Names of the hosts that have a copy, frozen or not."""
    return [h.name for h in hosts if Copy(h, uuid).inits]


# What is left


def _mounts(host):
    count = collections.Counter()
    for line in _read(_PROC / str(host.pid) / 'mountinfo').splitlines():
        left, _, right = line.partition(' - ')
        count[left.split(' ')[4], right.split(' ')[0]] += 1
    return {f'{point} ({kind}) #{n}' for (point, kind), total in count.items()
            for n in range(total)}


def _links(host):
    lines = _read(_PROC / str(host.pid) / 'net/dev').splitlines()[2:]
    return {line.split(':')[0].strip() for line in lines}


def _cgroups(host):
    tops = [_V2, *(_V1.glob('*') if _V1.is_dir() else ())]
    return {str(path) for top in tops
            for path in (top / host.cgroup_parent).rglob('*')
            if path.is_dir()}


def backing_file(device):
    """Of a loop device, or nothing."""
    name = pathlib.Path(device).name
    return _read(
        pathlib.Path('/sys/block', name, 'loop/backing_file')).strip()


def loops(host):
    """The loop devices of its instances.

    :returns: device → file
    """
    top = host.directory / 'state'
    return {device: pathlib.Path(file)
            for path in pathlib.Path('/sys/block').glob('loop*')
            if str(top) in (file := backing_file(
                device := f'/dev/{path.name}'))}


def _files(host):
    found = set()
    root = _PROC / str(host.pid) / 'root'
    for top, skipped in (
            (root / 'run/pyc', ('.cache',)),
            (root / str(host.directory / 'state')[1:],
             ('logs', 'keys', 'lost+found'))):
        for directory, names, files in os.walk(top):
            names[:] = [n for n in names if n not in skipped and
                        # An image is allowed to stay.
                        not n.startswith('sha256-')]
            for name in [*names, *files]:
                path = os.path.join(directory, name).removeprefix(str(root))
                if not name.startswith('keeper') and path not in _KEPT:
                    found.add(path)
    return found


def _commands(host):
    agent = host.process.pid if host.process is not None else None
    return {f'{pid} {command(pid)[:120]}' for pid in processes(host)
            if pid != agent and 'keeper' not in command(pid)}


def _settings():
    return {f'{name} = {_read(_PROC / "sys" / name).strip()}'
            for name in _SYSCTLS}


def traces(host, settings):
    """All that a host has, by kind.

    :param settings: whether the kernel's settings count: they are those of
        other tests, too
    """
    found = {
        'mount': _mounts(host), 'network device': _links(host),
        'control group': _cgroups(host), 'loop device': {
            str(file) for file in loops(host).values()},
        'file': _files(host), 'process': _commands(host)}
    if settings:
        found['kernel setting'] = _settings()
    return found


def left(before, host, settings, timeout=15.0):
    """What a host has and had not before; waits for what just ends."""
    deadline = time.monotonic() + timeout
    while True:
        now = traces(host, settings)
        found = [f'host {host.name}: {kind} {thing}'
                 for kind, things in now.items()
                 for thing in sorted(things - before[kind])]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
