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

from oslo_log import log as logging

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime import procfs
from nova_pycontainer.runtime import revert
from nova_pycontainer.runtime import volume as rvolume

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import container
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

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
            if made.id == (item.st.spec.get('root') or {}).get('id'):
                raise errors.ContainerError(
                    'exists', f'volume {made.id} is its root')
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
                    with r.step('volume-show', lambda: hide(
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
                revoke_unused(item, found[0])
                hide(item, found[0])
                item.nodes.remove(found[0])
            self._host.change(entry, {'volumes': [
                v for v in item.st.spec['volumes'] if v['id'] != volume]})
            return entry.container.info()

    @staticmethod
    def recover(item: 'container.Container') -> None:
        """Have a container that runs open its volumes again, after an agent
        that was killed.
        """
        pid = item.live_pid()
        if pid is None:
            return
        for v in item.devices():
            try:
                if item.nodes.number(v) == rvolume.device_of(v):
                    item.nodes.reopen(v)
                else:
                    put(item, v, pid)
            except (OSError, errors.ContainerError) as e:
                LOG.error('instance %s: /dev/%s is not there: %s',
                          item.uuid, v.name, e)

    def check_alone(self, item: 'container.Container') -> None:
        """See that nobody writes to what the kernel is about to mount.

        :raises ContainerError: ``in_use``; ``invalid``: it is not connected
        """
        if not item.st.spec.get('root'):
            return
        root = rvolume.Volume.from_dict(item.st.spec['root'])
        device = rvolume.device_of(root)
        for entry in self._host.entries():
            other = entry.container
            if any(other.nodes.number(v) == device
                   for v in other.spec.volumes):
                raise errors.ContainerError(
                    'in_use', f'volume {root.id} is attached to instance '
                    f'{other.uuid}', uuid=item.uuid,
                    remedy='Detach it there first')


def hide(
    item: 'container.Container', volume: rvolume.Volume
) -> None:
    """Unmount a volume's node wherever the guest has it."""
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


def put(
    item: 'container.Container', volume: rvolume.Volume, pid: int,
    before: os.stat_result | None = None,
) -> None:
    """Have the device of a volume in a guest that runs, whatever is in its
    place; idempotent.

    :param pid: of the guest's init
    :param before: whose it shall be, as of :meth:`.volume.Nodes.revoke`
    :raises ContainerError: ``invalid``, ``exists``
    """
    # A node that is unlinked cannot be told from others in the guest.
    hide(item, volume)
    item.nodes.remove(volume)
    item.nodes.make([volume])
    if before is not None and not volume.read_only:
        item.nodes.give_back(volume, before)
    item.nodes.show(volume, pid)


def revoke_unused(
    item: 'container.Container', volume: rvolume.Volume
) -> os.stat_result | None:
    """Have nobody open a volume's device any more, if nobody has it open.

    :returns: as :meth:`.volume.Nodes.revoke`
    :raises ContainerError: ``in_use``: it is as it was
    """
    # In this order: between the two nobody comes.
    before = item.nodes.revoke(volume)
    if before is not None:
        try:
            _check_unused(item, volume)
        except BaseException:
            item.nodes.give_back(volume, before)
            raise
    return before


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
        return procfs.text(f'/proc/{pid}/comm').strip()
    except OSError:
        return 'a process that has ended'
