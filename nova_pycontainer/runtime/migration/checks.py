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

"""Checks before a migration: can this guest leave, can that host take it.
"""

import collections.abc as cabc
import os
import platform
import shutil
import typing as ty

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import fuse
from nova_pycontainer.runtime import lxcfs
from nova_pycontainer.runtime.migration import compatibility
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import inspection
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer.runtime import network

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

Facts = dict[str, ty.Any]
Problem = inspection.Problem

FORMAT = 1
#: What is left of a disk that a guest may arrive on, in bytes.
_RESERVE = 64 << 20
#: Images, while they are restored, and what CRIU needs itself, in bytes.
_MEMORY_RESERVE = 64 << 20


class Checks:
    """The checks of one host."""

    def __init__(
        self, owner: 'host.Host', config: rconfig.Config, tool: criu.Criu
    ) -> None:
        self._host = owner
        self._config = config
        self._criu = tool

    def own(self) -> Facts:
        """What the other side has to compare with its own.

        :raises ContainerError: ``unsupported``: there is no CRIU
        """
        return {
            'format': FORMAT,
            **versions.own(),
            'cpu': compatibility.cpu(),
            'kernel': platform.release(),
            'criu': '.'.join(map(str, self._criu.version())),
            'cgroup': self._host.host_info()['cgroup']['mode'],
        }

    def source(self, uuid: str) -> Facts:
        """What has to move, and what of it cannot.

        The guest runs meanwhile and does not notice.

        :returns: ``facts`` for :meth:`destination`, ``problems``,
            ``warnings``
        :raises ContainerError: ``not_found``, ``bad_state``
        """
        entry = self._host.entry(uuid)
        entry.require('running', 'paused')
        item = entry.container
        info = item.info()
        problems = []
        if entry.migration is not None:
            problems.append(Problem(
                'migrating', 'it is being migrated already',
                'Wait for the end of that migration, or abort it'))
        if item.st.spec.get('root'):
            # Two hosts with one file system mounted destroy it, and the
            # destination has to mount it before the source lets go.
            problems.append(Problem(
                'root-volume', 'its root is a volume, which no two hosts '
                'can have mounted at a time', 'Migrate it cold'))
            return _result(
                {**self.own(), 'uuid': uuid}, problems, [])
        look = inspection.Inspection(int(info['pid']), item.cgroup, item.nodes)
        look.run()
        problems += look.problems
        facts = {
            **self.own(),
            'uuid': uuid,
            'state': info['state'],
            'base_id': info['base_id'],
            'layer': info['layer'],
            'layer_bytes': self._host.layers.require(info['layer']).bytes,
            'image_id': info['image_id'],
            'memory_bytes': info['memory_bytes'],
            # What the file system says, so what a copy needs at most.
            'disk_bytes': _used(item.disk.upper, info),
            'processes': look.processes,
            'threads': look.threads,
            'nics': len(info['nics']),
            'limited_nics': sum(nic.limited for nic in item.spec.nics),
            'nesting': item.spec.nesting,
            'lxcfs': look.shares,
            'fuse': look.fuse,
        }
        return _result(facts, problems, [])

    def destination(self, facts: Facts) -> Facts:
        """Whether a container that :meth:`source` has looked at can come.

        :returns: ``facts`` of this host, ``problems``, ``warnings``
        :raises ContainerError: ``invalid``
        """
        found = versions.of(facts, 'source') or versions.difference(
            facts.get('format'), 'the source', FORMAT)
        ours = self.own()
        if found is not None:
            # What else it has said may mean anything.
            return _result(ours, [Problem('protocol', *found)], [])
        try:
            problems, warnings = compatibility.compare(facts, ours)
            layer = self._host.layer_present(str(facts['layer']))
            problems += self._room(facts, layer)
            problems += self._ids(str(facts['uuid']), int(facts['base_id']))
            # Of an older agent, which gives its guests none.
            problems += self._shares(facts.get('lxcfs') or ())
            problems += self._fuse(bool(facts.get('fuse')))
            problems += _limits(int(facts.get('limited_nics') or 0))
        except (KeyError, TypeError, ValueError) as e:
            raise errors.ContainerError(
                'invalid', 'the facts of the source are incomplete',
                cause=repr(e)) from e
        ours['layer_present'] = layer
        return _result(ours, problems, warnings)

    def _room(
        self, facts: cabc.Mapping[str, ty.Any], layer: bool
    ) -> list[Problem]:
        problems = []
        need = int(facts['disk_bytes']) + _RESERVE
        what = 'the guest\'s files'
        if not layer:
            need += int(facts.get('layer_bytes') or 0)
            what += ' and its image'
        free = shutil.disk_usage(self._config.state_dir).free
        if need > free:
            problems.append(Problem(
                'disk', f'{what} need {need >> 20} MiB, of '
                f'which {free >> 20} MiB are free here',
                'Free space, or migrate to another host'))
        need = int(facts['memory_bytes']) + _MEMORY_RESERVE
        available = int(self._host.host_info()['memory_available_bytes'])
        if need > available:
            problems.append(Problem(
                'memory', f'the guest\'s memory needs {need >> 20} MiB, of '
                f'which {available >> 20} MiB are available here',
                'Free memory, or migrate to another host'))
        return problems

    def _shares(self, names: cabc.Iterable[str]) -> list[Problem]:
        here = lxcfs.Lxcfs(self._config.lxcfs_dir)
        missing = sorted({*map(str, names)} - {*here.files()})
        if not missing:
            return []
        return [Problem(
            'lxcfs', 'the guest has /' + ', /'.join(missing) + ' of lxcfs, '
            'which this host has not', f'{here.remedy()} on this host, or '
            'migrate to another one, or cold')]

    @staticmethod
    def _fuse(wanted: bool) -> list[Problem]:
        if not wanted or fuse.of_host():
            return []
        return [Problem(
            'fuse', 'the guest has /dev/fuse, which this host has not',
            f'{guest.FUSE_REMEDY} on this host, or migrate to another one, '
            'or cold')]

    def _ids(self, uuid: str, base_id: int) -> list[Problem]:
        used = self._host.reserved_ids().get(base_id)
        if used is not None:
            return [Problem(
                'id-range', f'the host ids from {base_id} on, which the '
                f'guest has, are used for {used} here',
                'Set [pycontainer]idmap_base and idmap_count to the same '
                'values on all hosts')]
        for info in self._host.list():
            if info['uuid'] == uuid:
                return [Problem(
                    'exists', 'this host has a container of it already '
                    f'({info["state"]})', 'Delete it there first, if it is '
                    'left over of an earlier migration')]
            if info['base_id'] == base_id:
                return [Problem(
                    'id-range', f'the host ids from {base_id} on, which the '
                    f'guest has, belong to {info["uuid"]} here',
                    'Migrate to another host. The larger '
                    '[pycontainer]idmap_count is, the rarer this is')]
        return []


def _limits(number: int) -> list[Problem]:
    """:param number: how many interfaces have limits"""
    if number:
        try:
            network.check_limits()
        except errors.ContainerError as e:
            return [Problem(
                'interface-limits', 'the bandwidth of the guest\'s '
                'interfaces is limited, which this host cannot do: '
                f'{e.cause}', e.remedy or 'Migrate to another host')]
    return []


def _used(upper: os.PathLike[str], info: cabc.Mapping[str, ty.Any]) -> int:
    """Bytes that the guest has written to its disk, at most."""
    used = info['disk']['used_bytes']
    if used is not None:
        return int(used)
    total = 0
    for directory, _, names in os.walk(upper):
        for name in names:
            try:
                total += os.lstat(
                    os.path.join(directory, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _result(
    facts: Facts, problems: cabc.Iterable[Problem],
    warnings: cabc.Iterable[Problem],
) -> Facts:
    return {'facts': facts,
            'problems': [p.to_dict() for p in problems],
            'warnings': [w.to_dict() for w in warnings]}
