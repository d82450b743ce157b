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

"""Which CPUs of the host each container runs on.

A guest counts its CPUs by asking the scheduler (sched_getaffinity(2), as
nproc(1) does), which answers with its cpuset. So a container of n vCPUs gets
n CPUs, where its quota alone would do to limit it. They are chosen when it
starts, here or on another host, and stay until it ends.
"""

import collections.abc as cabc
import dataclasses
import enum
import functools
import pathlib
import threading
import typing as ty

from nova_pycontainer.runtime import errors

_SYS: ty.Final = pathlib.Path('/sys/devices/system')
_MAX: ty.Final = 8192

Cpus = frozenset[int]


class Policy(enum.StrEnum):
    #: As many as it has vCPUs, of those that it may have.
    OWN = 'own'
    #: All that it may have.
    FLOATING = 'floating'
    #: Exactly these, which no other container has.
    DEDICATED = 'dedicated'


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a container is to have; None: any that the host has."""

    policy: Policy = Policy.OWN
    cpus: Cpus | None = None
    #: NUMA nodes, of which it has memory and CPUs.
    nodes: Cpus | None = None

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'Wanted':
        """:raises ContainerError: ``invalid``"""
        try:
            policy = Policy(data.get('policy') or Policy.OWN)
        except ValueError:
            raise errors.ContainerError(
                'invalid', f'{data["policy"]!r} is no policy for CPUs'
            ) from None
        cpus, nodes = _numbers(data, 'cpus'), _numbers(data, 'nodes')
        if policy is Policy.DEDICATED and not cpus:
            raise errors.ContainerError(
                'invalid', 'the policy is dedicated, and no CPU is named')
        return cls(policy, cpus, nodes)


def _numbers(data: ty.Mapping[str, ty.Any], key: str) -> Cpus | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(
            isinstance(n, int) and 0 <= n < _MAX for n in value):
        raise errors.ContainerError(
            'invalid', f'{key} is {value!r}, not a list of their numbers')
    return frozenset(value)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a container has; None: what its parent has."""

    cpus: Cpus | None = None
    nodes: Cpus | None = None


def parse(text: str) -> Cpus:
    """The kernel's notation: ``0-3,6``."""
    found: set[int] = set()
    for part in text.strip().split(','):
        if part:
            first, _, last = part.partition('-')
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def listing(numbers: cabc.Iterable[int]) -> str:
    """The reverse of :func:`parse`."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ','.join(
        str(first) if first == last else f'{first}-{last}'
        for first, last in ranges)


# The host

@dataclasses.dataclass(frozen=True)
class Node:
    """A NUMA node with CPUs. Only what is online counts."""

    id: int
    cpus: Cpus
    memory_bytes: int
    #: Of all of its CPUs; None: they are in several.
    socket: int | None
    #: The threads of each core.
    cores: tuple[Cpus, ...]

    def to_dict(self) -> dict[str, ty.Any]:
        return {
            'id': self.id, 'cpus': sorted(self.cpus),
            'memory_bytes': self.memory_bytes, 'socket': self.socket,
            'cores': [sorted(core) for core in self.cores]}


def nodes(top: pathlib.Path = _SYS) -> tuple[Node, ...]:
    """Those of this host, with the CPUs that are online now."""
    return _nodes(top, (top / 'cpu/online').read_text())


@functools.lru_cache(maxsize=4)
def _nodes(top: pathlib.Path, online_text: str) -> tuple[Node, ...]:
    online = parse(online_text)
    cores = {cpu: _core(top, cpu, online) for cpu in online}
    found = []
    for directory in sorted(top.glob('node/node[0-9]*'),
                            key=lambda d: int(d.name[4:])):
        cpus = parse((directory / 'cpulist').read_text()) & online
        if cpus:
            found.append((int(directory.name[4:]), cpus,
                          _memory(directory / 'meminfo')))
    if not found:
        # A kernel without NUMA.
        found = [(0, online, 0)]
    if len(found) == 1:
        # What a virtual machine got late, some kernels count for the machine
        # and for no node.
        number, cpus, _ = found[0]
        found = [(number, cpus, _memory(pathlib.Path('/proc/meminfo')))]
    return tuple(Node(
        number, cpus, memory, _socket(top, cpus),
        cores=tuple(sorted({cores[cpu] for cpu in cpus}, key=min)))
        for number, cpus, memory in found)


def _core(top: pathlib.Path, cpu: int, online: Cpus) -> Cpus:
    try:
        return parse((top / f'cpu/cpu{cpu}/topology/thread_siblings_list'
                      ).read_text()) & online
    except OSError:
        return frozenset((cpu,))


def _socket(top: pathlib.Path, cpus: Cpus) -> int | None:
    try:
        found = {int((top / f'cpu/cpu{cpu}/topology/physical_package_id'
                      ).read_text()) for cpu in cpus}
    except OSError:
        return None
    return found.pop() if len(found) == 1 else None


def _memory(file: pathlib.Path) -> int:
    for line in file.read_text().splitlines():
        name, _, rest = line.partition('MemTotal:')
        if rest:
            return int(rest.split()[0]) << 10
    return 0


# Who has which

class Pool:
    """The CPUs of one host.

    :param available: which there are for containers; None: no control group
        can limit them to some
    """

    def __init__(
        self, available: cabc.Callable[[], Cpus | None],
        topology: cabc.Callable[[], cabc.Sequence[Node]] = nodes,
    ) -> None:
        self._available = available
        self._topology = topology
        self._lock = threading.Lock()
        self._shares: dict[str, Share] = {}
        #: Where they run, and how many vCPUs they have.
        self._weights: dict[str, tuple[Cpus, int]] = {}

    def of(self, uuid: str) -> Share:
        return self._shares.get(uuid, Share())

    def take(self, uuid: str, wanted: Wanted, vcpus: int) -> Share:
        """Choose the CPUs of a container that is about to run.

        :raises ContainerError: ``unsupported``: this host has not what it
            needs
        """
        topology = self._topology()
        with self._lock:
            self._forget(uuid)
            available = self._available()
            if available is None:
                if wanted.policy is Policy.DEDICATED:
                    raise errors.ContainerError(
                        'unsupported', 'it is to have CPUs of its own, and '
                        'this host has no cgroup controller for that',
                        uuid=uuid, remedy='Mount the controller cpuset')
                return Share()
            if wanted.policy is Policy.DEDICATED:
                cpus = self._dedicated(uuid, wanted, available)
            else:
                cpus = self._permitted(uuid, wanted, available, topology)
                if wanted.policy is Policy.OWN:
                    cpus = self._choose(cpus, vcpus, topology)
            # Who may run anywhere also has what comes online later.
            everywhere = (wanted.policy is Policy.FLOATING and
                          wanted.cpus is None and wanted.nodes is None)
            share = Share(None if everywhere else cpus, wanted.nodes)
            self._shares[uuid] = share
            self._weights[uuid] = cpus, vcpus
            return share

    def note(self, uuid: str, cpus: Cpus, vcpus: int) -> None:
        """Know of a container that runs already."""
        with self._lock:
            self._shares[uuid] = Share(cpus)
            self._weights[uuid] = cpus, vcpus

    def give_back(self, uuid: str) -> None:
        """It runs no longer; idempotent."""
        with self._lock:
            self._forget(uuid)

    def _forget(self, uuid: str) -> None:
        self._shares.pop(uuid, None)
        self._weights.pop(uuid, None)

    @staticmethod
    def _dedicated(uuid: str, wanted: Wanted, available: Cpus) -> Cpus:
        assert wanted.cpus is not None
        missing = wanted.cpus - available
        if missing:
            raise errors.ContainerError(
                'unsupported', f'the CPUs {listing(missing)}, which it is to '
                'have for itself, are not online on this host', uuid=uuid,
                remedy='Bring them online, or migrate the server')
        return wanted.cpus

    @staticmethod
    def _permitted(
        uuid: str, wanted: Wanted, available: Cpus,
        topology: cabc.Sequence[Node],
    ) -> Cpus:
        found = available if wanted.cpus is None else available & wanted.cpus
        if wanted.nodes is not None:
            found &= frozenset().union(*(
                node.cpus for node in topology if node.id in wanted.nodes))
        if not found:
            which = ('any' if wanted.cpus is None
                     else f'one of the CPUs {listing(wanted.cpus)}')
            where = ('' if wanted.nodes is None
                     else f' of the NUMA nodes {listing(wanted.nodes)}')
            raise errors.ContainerError(
                'unsupported', f'it may run on {which}{where}, and none is '
                'online on this host', uuid=uuid,
                remedy='Bring one online, or name others in '
                       '[compute]cpu_shared_set')
        return found

    def _choose(
        self, candidates: Cpus, count: int, topology: cabc.Sequence[Node]
    ) -> Cpus:
        """Those with the least to do; on one NUMA node if that costs nothing.
        """
        if count >= len(candidates):
            return candidates
        loads = dict.fromkeys(candidates, 0.0)
        for cpus, vcpus in self._weights.values():
            for cpu in cpus & candidates:
                loads[cpu] += vcpus / len(cpus)
        cores = {cpu: core for node in topology for core in node.cores
                 for cpu in core}
        sets = [node.cpus & candidates for node in topology]
        picks = [_pick(cpus, count, loads, cores)
                 for cpus in (*sets, candidates) if len(cpus) >= count]
        # The first of equals is on one node, if any is.
        return min(picks, key=lambda pick: max(loads[cpu] for cpu in pick))


def _pick(
    candidates: Cpus, count: int, loads: cabc.Mapping[int, float],
    cores: cabc.Mapping[int, Cpus],
) -> Cpus:
    """Threads of one core share it, so a guest has one of each if it can."""
    picked: set[int] = set()
    while len(picked) < count:
        picked.add(min(candidates - picked, key=lambda cpu: (
            loads[cpu],
            sum(loads.get(thread, 0) + (thread in picked)
                for thread in cores.get(cpu, ())), cpu)))
    return frozenset(picked)
