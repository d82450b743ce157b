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

"""Volumes that come and go while a container runs: the verbs."""

import os
import stat
import typing as ty

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime import revert
from nova_pycontainer.runtime import volume as rvolume

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import container
    from nova_pycontainer.runtime import host

Info = dict[str, ty.Any]


class Volumes:
    """The volumes of one host's containers."""

    def __init__(self, owner: 'host.Host') -> None:
        self._host = owner

    def attach(self, uuid: str, volume: Info) -> Info:
        """Give a container one more volume; idempotent.

        One that runs has it at once, any other one at its next start.

        :raises ContainerError: ``invalid``, ``exists``, ``bad_state``
        """
        made = rvolume.Volume.from_dict(volume)
        with self._host.locked(uuid) as entry:
            entry.check_changeable()
            item = entry.container
            if any(v.id == made.id for v in item.spec.volumes):
                return item.info()
            kept = [*(item.st.spec.get('volumes') or []), made.to_dict()]
            rvolume.parse(kept)
            pid = item.live_pid()
            with revert.Reverter(uuid) as r:
                if pid is None:
                    rvolume.device_of(made)
                else:
                    with r.step('volume-node', lambda: item.nodes.remove(
                            made)):
                        item.nodes.make([made])
                    with r.step('volume-limit'):
                        item.limit_io(made)
                    with r.step('volume-show', lambda: self._hide(
                            item, made)):
                        item.nodes.show(made, pid)
                with r.step('volume-record'):
                    self._host.change(entry, {'volumes': kept})
                r.success()
            return entry.container.info()

    def detach(self, uuid: str, volume: str) -> Info:
        """Take a volume away; idempotent.

        :param volume: its id
        :raises ContainerError: ``in_use``: a process has it open;
            ``bad_state``
        """
        with self._host.locked(uuid) as entry:
            entry.check_changeable()
            item = entry.container
            found = [v for v in item.spec.volumes if v.id == volume]
            if not found:
                return item.info()
            if item.live_pid() is not None:
                # Nobody can open it any more, then nobody has it open.
                before = item.nodes.revoke(found[0])
                if before is not None:
                    try:
                        _check_unused(item, found[0])
                    except BaseException:
                        item.nodes.give_back(found[0], before)
                        raise
                self._hide(item, found[0])
                item.nodes.remove(found[0])
            self._host.change(entry, {'volumes': [
                v for v in item.st.spec['volumes'] if v['id'] != volume]})
            return entry.container.info()

    @staticmethod
    def _hide(
        item: 'container.Container', volume: rvolume.Volume
    ) -> None:
        device = item.nodes.device()
        if device is None:
            return
        number = blockio.number(device)
        points: dict[int, list[str]] = {}
        seen = set()
        init = item.live_pid()
        for pid in (*([init] if init else []), *item.cgroup.processes()):
            try:
                namespace = os.readlink(f'/proc/{pid}/ns/mnt')
                # Somebody in a chroot sees only what is in there.
                if namespace in seen or (
                        pid != init and os.readlink(f'/proc/{pid}/root') !=
                        '/'):
                    continue
                seen.add(namespace)
                found = [
                    mount.point for mount in guest.mounts(pid)
                    if mount.device == number and
                    mount.root == f'/{volume.name}']
            except OSError:
                continue
            if found:
                points[pid] = found
        item.nodes.hide(volume, points)


def _check_unused(
    item: 'container.Container', volume: rvolume.Volume
) -> None:
    """:raises ContainerError: ``in_use``, naming the process"""
    device = os.stat(item.nodes.path(volume)).st_rdev
    for pid in item.cgroup.processes():
        for directory in _open_files(pid):
            try:
                names = os.listdir(directory)
            except OSError:
                continue
            for name in names:
                try:
                    status = os.stat(f'{directory}/{name}')
                except OSError:
                    continue
                if stat.S_ISBLK(status.st_mode) and (
                        status.st_rdev == device):
                    raise errors.ContainerError(
                        'in_use', f'/dev/{volume.name} is open in the guest '
                        f'({_name(pid)})', uuid=item.uuid,
                        remedy='Unmount it there, or stop that process')


def _open_files(pid: int) -> list[str]:
    # Threads may have tables of their own, and outlive their leader.
    try:
        threads = os.listdir(f'/proc/{pid}/task')
    except OSError:
        threads = []
    return [f'/proc/{pid}/map_files',
            *(f'/proc/{pid}/task/{thread}/fd' for thread in threads)]


def _name(pid: int) -> str:
    try:
        with open(f'/proc/{pid}/comm', errors='replace') as f:
            return f.read().strip()
    except OSError:
        return 'a process that has ended'
