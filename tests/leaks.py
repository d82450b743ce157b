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

"""What a test may not leave behind on the host, and a fixture that looks.

Everything is read from the kernel (``/proc``, ``/sys``); only the standard
library is needed, so that ``tools/check_leaks`` runs before anything is
installed.
"""

import dataclasses
import json
import os
import pathlib
import re
import time
import typing

_PROC = pathlib.Path('/proc')
_NAMESPACES = ('cgroup', 'ipc', 'mnt', 'net', 'pid', 'user', 'uts')
#: Settings of the whole kernel that CRIU and containers make one change, and
#: that have to be put back.
_SYSCTLS = (
    'fs.inotify.max_user_instances',
    'fs.pipe-max-size',
    'net.ipv4.ip_forward',
    'user.max_user_namespaces',
    'vm.unprivileged_userfaultfd',
)
#: Where runtimes and we keep what goes with a running container.
_RUN_GLOBS = (
    '/run/*pycontainer*',
    '/run/crun/*',
    '/run/netns/*',
    '/run/runc/*',
    '/tmp/*pycontainer*',
    '/tmp/.criu*',
    '/dev/shm/*pycontainer*',
)
#: Control groups that an init system makes for others than us.
_FOREIGN_CGROUP = re.compile(
    r'^/(user\.slice|init\.scope'
    r'|system\.slice/(?!.*(pycontainer|crun|libpod|runc)))(/|$)')


class LeakError(AssertionError):
    """Something was left; the text lists it, one thing a line."""


@dataclasses.dataclass
class Process:
    """A process as it was seen: enough to know it again and to name it."""

    pid: int
    start: int
    parent: int
    command: str
    cgroup: str
    namespaces: dict[str, str]

    @property
    def key(self) -> str:
        return f'{self.pid}/{self.start}'


@dataclasses.dataclass
class Snapshot:
    """What there is; every set maps a thing's key to its description."""

    things: dict[str, dict[str, str]]
    processes: dict[int, Process]
    #: The one who looks, and its ancestors: their later children are not
    #: excused by them.
    own: list[int]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> 'Snapshot':
        data = json.loads(text)
        return cls(
            things=data['things'],
            processes={int(pid): Process(**process)
                       for pid, process in data['processes'].items()},
            own=data['own'])


def _read(path: pathlib.Path) -> str | None:
    try:
        return path.read_text(errors='replace')
    except OSError:
        return None


def _link(path: pathlib.Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _process(pid: int) -> Process | None:
    """What ``/proc`` says of one process.

    None for a kernel thread and for one that is gone or a zombie: that holds
    nothing but its number, and its parent is looked at itself.
    """
    base = _PROC / str(pid)
    stat = _read(base / 'stat')
    if stat is None:
        return None
    # The command's name may hold blanks and brackets: fields count from the
    # last one.
    fields = stat[stat.rindex(')') + 2:].split()
    state, parent, flags, start = (
        fields[0], int(fields[1]), int(fields[6]), int(fields[19]))
    kernel_thread = 0x00200000
    if flags & kernel_thread or state in 'ZX':
        return None
    command = (_read(base / 'cmdline') or '').replace('\0', ' ').strip()
    namespaces = {}
    for name in _NAMESPACES:
        target = _link(base / 'ns' / name)
        if target is not None:
            namespaces[name] = target
    return Process(
        pid=pid, start=start, parent=parent,
        command=command or stat[stat.index('('):stat.rindex(')') + 1],
        cgroup=' '.join(sorted({
            line.split(':', 2)[2]
            for line in (_read(base / 'cgroup') or '').splitlines()})),
        namespaces=namespaces)


def _processes() -> dict[int, Process]:
    found = {}
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            process = _process(int(entry))
            if process is not None:
                found[process.pid] = process
    return found


def _mounts() -> list[tuple[str, str, str]]:
    """(mount point, type, source) of every mount in this namespace."""
    found = []
    for line in (_read(_PROC / 'self/mountinfo') or '').splitlines():
        left, _, right = line.partition(' - ')
        point = left.split(' ')[4].encode().decode('unicode_escape')
        kind, source = right.split(' ')[:2]
        found.append((point, kind, source))
    return found


def _cgroups(mounts: list[tuple[str, str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for point, kind, _ in mounts:
        if kind not in ('cgroup', 'cgroup2'):
            continue
        for directory, _, _ in os.walk(point):
            path = '/' + os.path.relpath(directory, point)
            if path == '/.' or _FOREIGN_CGROUP.match(path):
                continue
            found[directory] = directory
    return found


def _links() -> dict[str, str]:
    names = sorted(os.listdir('/sys/class/net'))
    return {name: name for name in names}


def _loops() -> dict[str, str]:
    found = {}
    for backing in pathlib.Path('/sys/block').glob('loop*/loop/backing_file'):
        device = backing.parts[3]
        found[device] = f'/dev/{device} on {(_read(backing) or "?").strip()}'
    return found


def _files() -> dict[str, str]:
    found = {}
    for pattern in _RUN_GLOBS:
        for path in pathlib.Path('/').glob(pattern[1:]):
            found[str(path)] = str(path)
    return found


def _sysctls() -> dict[str, str]:
    found = {}
    for name in _SYSCTLS:
        value = _read(_PROC / 'sys' / name.replace('.', '/'))
        if value is not None:
            value = ' '.join(value.split())
            found[f'{name}={value}'] = f'{name} is now {value}'
    return found


def take() -> Snapshot:
    """A snapshot of the host as it is."""
    mounts = _mounts()
    processes = _processes()
    own = []
    pid = os.getpid()
    while pid > 0 and pid not in own:
        own.append(pid)
        process = processes.get(pid)
        pid = process.parent if process else 0
    counted: dict[str, int] = {}
    for point, kind, _ in mounts:
        counted[f'{kind} on {point}'] = counted.get(
            f'{kind} on {point}', 0) + 1
    return Snapshot(
        things={
            'mount': {f'{name} #{number}': name
                      for name, count in counted.items()
                      for number in range(count)},
            'control group': _cgroups(mounts),
            'network device': _links(),
            'loop device': _loops(),
            'file': _files(),
            'kernel setting': _sysctls(),
        },
        processes=processes, own=own)


def _excused(process: Process, now: Snapshot, before: Snapshot) -> bool:
    """Whether a process is the work of somebody who was there before.

    A daemon or a terminal that ran before the tests may start what it likes.
    PID 1 and the tests' own ancestors excuse nobody: they are who adopts what
    the tests leave.
    """
    seen = set()
    pid = process.parent
    while pid > 1 and pid not in seen:
        seen.add(pid)
        parent = now.processes.get(pid)
        if parent is None:
            return False
        if pid in now.own or pid in before.own:
            return False
        old = before.processes.get(pid)
        if old is not None and old.key == parent.key:
            return True
        pid = parent.parent
    return False


def compare(before: Snapshot, now: Snapshot,
            marker: str | None = None) -> list[str]:
    """What there is in ``now`` that was not there before, one text each.

    :param marker: name only what has this text in its name, command or
        control group: several tests may run at a time
    """
    found = []

    def add(kind: str, text: str, *also: str) -> None:
        if marker is None or any(marker in part for part in (text, *also)):
            found.append(f'{kind}: {text}')

    for kind, things in now.things.items():
        fresh_keys = set(things) - set(before.things[kind])
        for key in sorted(fresh_keys):
            # Of a tree of control groups its top says enough.
            if kind != 'control group' or os.path.dirname(
                    key) not in fresh_keys:
                add(kind, things[key])
    old = {process.key for process in before.processes.values()}
    known = {namespace for process in before.processes.values()
             for namespace in process.namespaces.values()}
    for process in now.processes.values():
        if process.key in old or process.pid in now.own:
            continue
        if _excused(process, now, before):
            continue
        fresh = sorted(kind for kind, target in process.namespaces.items()
                       if target not in known)
        text = f'{process.pid} {process.command[:160]}'
        if fresh:
            text += f' (in its own {", ".join(fresh)} namespace)'
        add('process', text, process.command, process.cgroup)
    return found


def settled(before: Snapshot, *, marker: str | None = None,
            timeout: float = 20.0) -> list[str]:
    """What is still left after ``timeout`` seconds; sooner if nothing is.

    What ends, ends a little later than whoever ended it is told.
    """
    deadline = time.monotonic() + timeout
    while True:
        left = compare(before, take(), marker)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.25)


class LeakCheck:
    """A fixture (``useFixture``): its clean-up fails for what is left.

    Use it first, so that it is cleaned up last.

    :param marker: see :func:`compare`
    """

    def __init__(self, marker: str | None = None,
                 timeout: float = 20.0) -> None:
        self._marker = marker
        self._timeout = timeout
        self._before: Snapshot | None = None

    def setUp(self) -> None:
        self._before = take()

    def cleanUp(self, *args: typing.Any) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        left = settled(before, marker=self._marker, timeout=self._timeout)
        if left:
            raise LeakError('left behind:\n  ' + '\n  '.join(left))

    def getDetails(self) -> dict[str, typing.Any]:
        return {}

    def __enter__(self) -> 'LeakCheck':
        self.setUp()
        return self

    def __exit__(self, *args: typing.Any) -> None:
        self.cleanUp()
