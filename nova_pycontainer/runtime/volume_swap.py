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

"""One volume of a container in the place of another, with its data.

What a guest has open stays the device that it has opened: the kernel has no
way to put another one beneath it (device-mapper would have to be there from
the beginning). So it is done while nobody has it open, and until it is done
nobody can open it. The guest runs meanwhile.
"""

import os
import threading
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import revert
from nova_pycontainer.runtime import volume as rvolume
from nova_pycontainer.runtime import volumes

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import container
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

Info = dict[str, ty.Any]

#: Bytes that are read at a time, and after which they are on the device.
_PIECE: ty.Final = 4 << 20
_FLUSH: ty.Final = 64 << 20
_FLAGS: ty.Final = os.O_EXCL | os.O_CLOEXEC
#: Phases.
COPYING: ty.Final = 'copying'
COMPLETED: ty.Final = 'completed'
FAILED: ty.Final = 'failed'


class Swap:
    """One of them.

    :param old: id of the volume that goes
    :param new: the one that comes
    """

    def __init__(
        self, uuid: str, old: rvolume.Volume, new: rvolume.Volume
    ) -> None:
        self.uuid = uuid
        self.old, self.new = old, new
        #: Whose the old one's node was; None: there was none.
        self.before: os.stat_result | None = None
        self.phase = COPYING
        self.copied = self.size = 0
        self.error: errors.ContainerError | None = None
        self._aborted: str | None = None

    def abort(self, why: str) -> None:
        """Have it fail; idempotent."""
        self._aborted = self._aborted or why

    def check(self) -> None:
        """:raises ContainerError: ``aborted``"""
        if self._aborted:
            raise errors.ContainerError(
                'aborted', f'the replacing of volume {self.old.id} was ended: '
                f'{self._aborted}', uuid=self.uuid)

    def to_dict(self) -> Info:
        """``phase``, ``copied_bytes``, ``size_bytes``, ``error``."""
        return {'phase': self.phase, 'copied_bytes': self.copied,
                'size_bytes': self.size,
                'error': self.error.to_dict() if self.error else None}

    def copy(self) -> None:
        """Copy all of the old one's bytes.

        :raises ContainerError: ``aborted``; ``invalid``: they do not fit;
            ``in_use``: somebody else has one of them
        """
        source = self._open(self.old, os.O_RDONLY)
        try:
            target = self._open(self.new, os.O_RDWR)
            try:
                self._copy(source, target)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _open(self, volume: rvolume.Volume, mode: int) -> int:
        try:
            # open(2): a block device that is mounted, or otherwise taken,
            # is not opened with O_EXCL.
            return os.open(volume.path, mode | _FLAGS)
        except OSError as e:
            raise errors.ContainerError(
                'in_use', f'volume {volume.id} cannot be had for copying',
                uuid=self.uuid, cause=str(e),
                remedy='See who uses its device on this host') from e

    def _copy(self, source: int, target: int) -> None:
        self.size = os.lseek(source, 0, os.SEEK_END)
        room = os.lseek(target, 0, os.SEEK_END)
        if room < self.size:
            raise errors.ContainerError(
                'invalid', f'volume {self.new.id} has {room} bytes, volume '
                f'{self.old.id} has {self.size}', uuid=self.uuid,
                remedy='Take one that is at least as large')
        piece = memoryview(bytearray(_PIECE))
        kept = 0
        while self.copied < self.size:
            self.check()
            got = os.preadv(source, [piece], self.copied)
            written = 0
            while written < got:
                written += os.pwritev(
                    target, [piece[written:got]], self.copied + written)
            self.copied += got
            if not got:
                raise errors.ContainerError(
                    'internal', f'volume {self.old.id} ends at byte '
                    f'{self.copied} of {self.size}', uuid=self.uuid)
            if self.copied - kept >= _FLUSH or self.copied >= self.size:
                os.fsync(target)
                # Else one copy turns over all that the host's page cache has.
                for fd in (source, target):
                    os.posix_fadvise(
                        fd, kept, self.copied - kept, os.POSIX_FADV_DONTNEED)
                kept = self.copied


class Swaps:
    """The verbs."""

    def __init__(self, owner: 'host.Host') -> None:
        self._host = owner
        self._lock = threading.Lock()
        #: The last of each instance.
        self._swaps: dict[str, Swap] = {}

    def begin(self, uuid: str, old: str, volume: Info) -> Info:
        """Put a volume in the place of another; :meth:`status` tells how it
        goes.

        :param old: id of the one that goes
        :param volume: the one that comes; it gets the name of the other
        :returns: as :meth:`status`
        :raises ContainerError: ``in_use``: a process has the old one open;
            ``invalid``, ``bad_state``
        """
        with self._host.locked(uuid) as entry:
            entry.check_changeable()
            self._host.snapshots.check_movable(uuid)
            item = entry.container
            found = [v for v in item.spec.volumes if v.id == old]
            if not found:
                raise errors.ContainerError(
                    'invalid', f'the instance has no volume {old}',
                    uuid=uuid)
            swap = Swap(uuid, found[0], rvolume.Volume.from_dict(
                volume | {'name': found[0].name}))
            self._check(item, swap)
            if item.live_pid() is not None:
                swap.before = volumes.revoke_unused(item, swap.old)
                if swap.before is None:
                    raise errors.ContainerError(
                        'internal', f'volume {old} has no device in the '
                        'instance', uuid=uuid,
                        remedy='Reboot the server hard')
            entry.swap = swap
            with self._lock:
                self._swaps[uuid] = swap
        threading.Thread(
            target=self._run, args=(swap,), name=f'swap-{uuid[:8]}',
            daemon=True).start()
        return swap.to_dict()

    def status(self, uuid: str) -> Info:
        """How the last one goes.

        :returns: ``phase``: ``copying``, ``completed`` or ``failed``;
            ``copied_bytes`` of ``size_bytes``; ``error``
        :raises ContainerError: ``not_found``: this agent knows of none
        """
        with self._lock:
            swap = self._swaps.get(uuid)
        if swap is None:
            raise errors.ContainerError(
                'not_found', 'no volume of the instance is being replaced',
                uuid=uuid)
        return swap.to_dict()

    def abort(self, uuid: str) -> None:
        """Have the one that is being done fail; idempotent."""
        self.end(uuid, 'that was asked for')

    def end(self, uuid: str, why: str) -> None:
        """As :meth:`abort`, for a reason of ours."""
        with self._lock:
            swap = self._swaps.get(uuid)
        if swap is not None:
            swap.abort(why)

    def _run(self, swap: Swap) -> None:
        phase = FAILED
        try:
            with revert.Reverter(swap.uuid) as r:
                with r.step('swap-copy', lambda: self._give_back(swap)):
                    swap.copy()
                with self._host.locked(swap.uuid) as entry:
                    swap.check()
                    self._exchange(entry, swap)
                r.success()
            phase = COMPLETED
        except BaseException as e:
            if not isinstance(e, errors.ContainerError):
                LOG.exception('instance %s: volume %s cannot be replaced',
                              swap.uuid, swap.old.id)
            swap.error = errors.ContainerError.of(
                e, 'the volume cannot be replaced', swap.uuid)
            LOG.warning('instance %s: %s', swap.uuid, swap.error)
        finally:
            self._over(swap)
            swap.phase = phase

    def _over(self, swap: Swap) -> None:
        try:
            self._host.entry(swap.uuid).swap = None
        except errors.ContainerError:
            LOG.info('instance %s was deleted meanwhile', swap.uuid)

    def _give_back(self, swap: Swap) -> None:
        with self._host.locked(swap.uuid) as entry:
            entry.container.nodes.reopen(swap.old, swap.before)

    def _exchange(self, entry: 'host.Entry', swap: Swap) -> None:
        item = entry.container
        pid = item.live_pid()
        with revert.Reverter(swap.uuid) as r:
            if pid is not None:
                with r.step('swap-limit'):
                    item.limit_io(swap.new)
                with r.step('swap-show', lambda: volumes.put(
                        item, swap.old, pid, swap.before)):
                    volumes.put(item, swap.new, pid, swap.before)
            with r.step('swap-record'):
                self._host.change(entry, {'volumes': [
                    swap.new.to_dict() if v['id'] == swap.old.id else v
                    for v in item.st.spec['volumes']]})
            r.success()

    @staticmethod
    def _check(item: 'container.Container', swap: Swap) -> None:
        rvolume.parse([
            swap.new.to_dict() if v.id == swap.old.id else v.to_dict()
            for v in item.spec.volumes])
        device = rvolume.device_of(swap.new)
        if any(rvolume.device_of(v) == device for v in item.spec.volumes):
            raise errors.ContainerError(
                'exists', f'volume {swap.new.id} is one of the instance '
                'already', uuid=swap.uuid)
