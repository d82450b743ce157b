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

"""Consistent copies of containers' root file systems, as tar archives.

What a guest has changed is copied to a directory beside while the guest runs,
in the passes of a migration; only the last pass, which finds what has changed
since, needs the guest to stand still. The archive is made of that copy, so
how long its reader takes is of no concern to the guest. The disk of a
container that is down is read itself, and may not be started meanwhile.

``<state>/snapshots/<uuid>.<random>/`` is there as long as the archive is being
made, on disk and not in memory so that the next agent finds it if this one is
killed: it lets a guest that stands still go on and removes the rest.
"""

import collections.abc as cabc
import contextlib
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime.migration import sync_rsync
from nova_pycontainer.runtime import pack
from nova_pycontainer.runtime import pack_client
from nova_pycontainer.runtime import rescue
from nova_pycontainer.runtime import revert
from nova_pycontainer.runtime import snapshot
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import trees

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

#: Passes while the guest runs, and what is little enough to be left for the
#: last one.
_MAX_PASSES: ty.Final = 5
_LITTLE: ty.Final = 4 << 20
#: A guest may reboot in the middle that often.
_TRIES: ty.Final = 5
#: Seconds.
_MEASURE_TIMEOUT: ty.Final = 600.0
_TICK: ty.Final = 0.5
_FROZEN: ty.Final = 'frozen'

_ALIVE: ty.Final = ('created', 'running', 'paused')


class Snapshots:
    """The snapshots that are being made on this host."""

    def __init__(self, owner: 'host.Host', config: rconfig.Config) -> None:
        self._host = owner
        self._python = config.python or sys.executable
        self._dir = config.state_dir / 'snapshots'
        self._lock = threading.Lock()
        self._running: dict[str, snapshot.Claim] = {}

    def recover(self) -> None:
        """Clean up after an agent that was killed."""
        self._dir.mkdir(mode=0o700, exist_ok=True)
        for place in sorted(self._dir.iterdir()):
            uuid = place.name.rpartition('.')[0]
            try:
                self._thaw(uuid, place)
                trees.remove(place)
            except (OSError, errors.ContainerError) as e:
                LOG.error('%s, left by an interrupted snapshot, cannot be '
                          'cleaned up: %s', place, e)
            except Exception:
                LOG.exception('%s, left by an interrupted snapshot, cannot '
                              'be cleaned up', place)
            else:
                LOG.info('removed %s, left by an interrupted snapshot', place)

    def _thaw(self, uuid: str, place: pathlib.Path) -> None:
        try:
            of = state.read_json(place / _FROZEN)['process']
        except FileNotFoundError:
            return
        try:
            item = self._host.entry(uuid).container
        except errors.ContainerError:
            return
        if (item.st.run or {}).get('process') == of and (
                item.status() == 'paused'):
            item.cgroup.freeze(False)

    def close(self) -> None:
        """Give all of them up."""
        with self._lock:
            running = [*self._running.values()]
        for claim in running:
            claim.abort('the agent ends')
        for claim in running:
            claim.ended.wait(snapshot.LET_GO_TIMEOUT)

    # For those who change containers

    def _of(self, uuid: str) -> snapshot.Claim | None:
        with self._lock:
            return self._running.get(uuid)

    def check_startable(self, uuid: str) -> None:
        """:raises ContainerError: ``bad_state``: its disk is being read"""
        claim = self._of(uuid)
        if claim is not None and claim.whole:
            raise _busy(uuid)

    def check_movable(self, uuid: str) -> None:
        """:raises ContainerError: ``bad_state``: its disk is being read"""
        claim = self._of(uuid)
        if claim is not None and (claim.whole or claim.copying):
            raise _busy(uuid)

    def release(self, uuid: str) -> None:
        """Let go of the disk of a container that has ended."""
        claim = self._of(uuid)
        if claim is not None:
            claim.container_ends()

    def abort(self, uuid: str, wait: bool) -> None:
        """Give up the snapshot of a container that is being deleted.

        :param wait: until it has ended; not under the container's lock, which
            it needs to end
        """
        claim = self._of(uuid)
        if claim is not None:
            claim.abort('the instance is deleted')
            if wait:
                claim.ended.wait(snapshot.LET_GO_TIMEOUT)

    # The verb

    @contextlib.contextmanager
    def take(
        self, uuid: str, gone: cabc.Callable[[], bool] = lambda: False
    ) -> cabc.Iterator[cabc.Iterator[bytes]]:
        """Make an archive of a container's root, whatever its state.

        It has what the guest sees in its root file system, with its own ids,
        and nothing of what is mounted there.

        :param gone: whether nobody waits for it any more
        :returns: the archive in pieces. If they end without an error, that
            is all of it
        :raises ContainerError: ``not_found``, ``bad_state``, ``no_space``,
            ``aborted``, ``layer_missing``, ``timeout``
        """
        entry = self._host.entry(uuid)
        with self._registered(uuid) as claim, contextlib.ExitStack() as x:
            x.enter_context(self._watching(claim, gone))
            place = x.enter_context(self._place(uuid))
            job = x.enter_context(self._source(entry, claim, place))
            packing = pack_client.Packing(self._python, job)
            x.callback(packing.close)
            yield self._pieces(claim, packing)

    @staticmethod
    def _pieces(
        claim: snapshot.Claim, packing: pack_client.Packing
    ) -> cabc.Iterator[bytes]:
        size = 0
        with claim.breakable(packing.kill):
            for piece in packing:
                yield piece
                size += len(piece)
            claim.check()
        LOG.info('instance %s: a snapshot of %d bytes', claim.uuid, size)

    @contextlib.contextmanager
    def _registered(self, uuid: str) -> cabc.Iterator[snapshot.Claim]:
        claim = snapshot.Claim(uuid)
        with self._lock:
            if uuid in self._running:
                raise _busy(uuid)
            self._running[uuid] = claim
        try:
            yield claim
        except errors.ContainerError as e:
            e.uuid = e.uuid or uuid
            raise
        finally:
            with self._lock:
                del self._running[uuid]
            claim.ended.set()

    @staticmethod
    @contextlib.contextmanager
    def _watching(
        claim: snapshot.Claim, gone: cabc.Callable[[], bool]
    ) -> cabc.Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_TICK):
                if gone():
                    claim.abort('nobody waits for it any more')
                    return

        thread = threading.Thread(target=watch, name='snapshot', daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextlib.contextmanager
    def _place(self, uuid: str) -> cabc.Iterator[pathlib.Path]:
        place = self._dir / f'{uuid}.{secrets.token_hex(4)}'
        try:
            for path in (place, place / 'root', place / 'upper'):
                path.mkdir(mode=0o700)
            yield place
        finally:
            try:
                trees.remove(place)
            except OSError as e:
                # Not in place of the snapshot's own error.
                LOG.error('%s is left behind: %s', place, e)

    @contextlib.contextmanager
    def _locked(
        self, entry: 'host.Entry', claim: snapshot.Claim
    ) -> cabc.Iterator[str]:
        """Hold a container's lock, and know its state.

        Whoever has it may be waiting for the snapshot to let go.
        """
        while not entry.lock.acquire(timeout=_TICK):
            claim.check()
        try:
            item = entry.container
            if entry.migration is not None or item.st.moved:
                raise errors.ContainerError(
                    'bad_state', 'the instance is being migrated, or has '
                    'moved to another host', uuid=item.uuid)
            if item.st.incoming:
                item.check_here()
            rescue.check_not(item)
            if item.spec.root:
                raise errors.ContainerError(
                    'unsupported', 'the root of the instance is a volume',
                    uuid=item.uuid, remedy='Make a snapshot of the volume')
            if entry.deleted:
                raise errors.ContainerError(
                    'not_found', f'the container of instance {item.uuid} has '
                    'been deleted', uuid=item.uuid)
            claim.check()
            yield item.status()
        finally:
            entry.lock.release()

    # Files at rest

    @contextlib.contextmanager
    def _source(
        self, entry: 'host.Entry', claim: snapshot.Claim,
        place: pathlib.Path,
    ) -> cabc.Iterator[pack.Job]:
        """Have files at rest to pack."""
        if self._copied(entry, claim, place):
            yield self._job(entry, place, place / 'upper')
            return
        try:
            yield self._job(entry, place, entry.container.disk.upper)
        finally:
            with entry.lock:
                entry.container.disk.unmount()
                claim.whole = False

    def _job(
        self, entry: 'host.Entry', place: pathlib.Path, upper: pathlib.Path
    ) -> pack.Job:
        item = entry.container
        return pack.Job(
            layer=str(self._host.layer_root(item)), upper=str(upper),
            base=item.st.base_id, root=str(place / 'root'))

    def _copied(
        self, entry: 'host.Entry', claim: snapshot.Claim,
        place: pathlib.Path,
    ) -> bool:
        """:returns: False: the container is down, and its own disk mounted
        """
        for _ in range(_TRIES):
            current = self._begin(entry, claim)
            if current == 'down':
                return False
            if current == 'ending':
                time.sleep(_TICK)
                continue
            try:
                self._copy(entry, claim, place)
                return True
            except snapshot.Ended:
                LOG.info('instance %s: it ended during its snapshot, which '
                         'begins anew', claim.uuid)
            finally:
                claim.end_copying()
        raise errors.ContainerError(
            'aborted', 'the container does not stay up or down',
            remedy='Try again')

    def _begin(self, entry: 'host.Entry', claim: snapshot.Claim) -> str:
        """Claim the disk, up or down: the two differ in who may do what."""
        with self._locked(entry, claim) as current:
            if current in _ALIVE:
                claim.begin_copying()
                return 'alive'
            if entry.container.st.run is not None:
                # It has just ended, and may be about to reboot.
                return 'ending'
            self._mount(entry.container)
            claim.whole = True
            return 'down'

    def _mount(self, item: container.Container) -> None:
        """Make the disk of a container that is down readable."""
        layer = self._host.layer_root(item)
        with revert.Reverter(item.uuid) as r:
            with r.step('mount-disk', item.disk.unmount):
                item.disk.mount()
            with r.step('link-aliases', item.unmount_root):
                item.mount_root(layer)
                sync_links.link_aliases(layer, item.root, item.disk.upper)
                item.unmount_root()
            r.success()

    def _copy(
        self, entry: 'host.Entry', claim: snapshot.Claim,
        place: pathlib.Path,
    ) -> None:
        """Copy the upper of a container that is not down."""
        item = entry.container
        upper = item.disk.upper
        self._check_room(upper, claim)
        layer = self._host.layer_root(item)
        # Names that only the index of overlayfs knows. The guest may make
        # more, but most of the work is done.
        sync_links.link_aliases(layer, item.root, upper)
        copy = sync.Copy(place / 'upper')
        mark: sync.Mark | None = None
        for number in range(_MAX_PASSES):
            stats, mark = self._pass(claim, upper, copy, mark)
            faults.point('snapshot.pass')
            if number and stats.complete and stats.literal_bytes < _LITTLE:
                break
        with self._locked(entry, claim), self._frozen(
                entry.container, place):
            faults.point('snapshot.frozen')
            sync_links.link_aliases(layer, item.root, upper)
            self._pass(claim, upper, copy, mark, final=True)

    def _pass(
        self, claim: snapshot.Claim, upper: pathlib.Path, copy: sync.Copy,
        since: sync.Mark | None, final: bool = False,
    ) -> tuple[sync_rsync.Stats, sync.Mark]:
        ours, theirs = socket.socketpair()
        with ours, self._room(), contextlib.ExitStack() as stack:
            stack.enter_context(claim.breakable(
                lambda: ours.shutdown(socket.SHUT_RDWR)))
            with theirs:
                server = sync.serve(
                    upper, theirs, since=since, final=final, tied=True)
            stack.callback(server.close)
            return copy.fetch(ours, final=final, tied=True), server.mark

    @staticmethod
    @contextlib.contextmanager
    def _frozen(
        item: container.Container, place: pathlib.Path
    ) -> cabc.Iterator[None]:
        """Let the guest stand still. It is not paused for anybody else, and
        one that is paused stays so.
        """
        if item.status() != 'running':
            yield
            return
        marker = place / _FROZEN
        # Before it is: the next agent has to know.
        state.write_json(marker, {
            'format': state.FORMAT,
            'process': (item.st.run or {})['process']})
        began = time.monotonic()
        item.held = True
        try:
            item.cgroup.freeze(True)
            yield
        finally:
            item.cgroup.freeze(False)
            item.held = False
            LOG.info('instance %s: it stood still for %.3f s for a snapshot',
                     item.uuid, time.monotonic() - began)
            marker.unlink()

    # Room

    def _check_room(
        self, upper: pathlib.Path, claim: snapshot.Claim
    ) -> None:
        """:raises ContainerError: ``no_space``: known before anything is
            copied
        """
        need = _disk_usage(upper, claim)
        reserve = archive.Limits().min_free_bytes
        status = os.statvfs(self._dir)
        free = status.f_bavail * status.f_frsize
        if need + reserve > free:
            raise errors.ContainerError(
                'no_space', 'a copy of what the instance has written takes '
                f'{need >> 20} MiB, with a reserve of {reserve >> 20} MiB, '
                f'and {free >> 20} MiB are free in {self._dir}',
                remedy='Free space on this host, or stop the server first: '
                'it is not copied then')

    @contextlib.contextmanager
    def _room(self) -> cabc.Iterator[None]:
        try:
            yield
        except errors.ContainerError as e:
            if e.code == 'no_space':
                e.message = ('a copy of what the instance has written does '
                             f'not fit in {self._dir}')
                e.remedy = ('Free space on this host, or stop the server '
                            'first: it is not copied then')
            raise


def _busy(uuid: str) -> errors.ContainerError:
    return errors.ContainerError(
        'bad_state', 'a snapshot of the instance is being made', uuid=uuid,
        remedy='Try again when it is done')


def _disk_usage(top: pathlib.Path, claim: snapshot.Claim) -> int:
    """Bytes of disk space that a tree takes, as far as it stands still."""
    process = subprocess.Popen(
        ['du', '--summarize', '--block-size=1', '--one-file-system', str(top)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True)
    with process, claim.breakable(process.kill):
        try:
            text, _ = process.communicate(timeout=_MEASURE_TIMEOUT)
        except subprocess.TimeoutExpired as e:
            process.kill()
            raise errors.ContainerError(
                'timeout', 'measuring the files of the instance takes too '
                'long', remedy='Look at the disk of this host') from e
        claim.check()
    try:
        return int(text.split()[0])
    except (ValueError, IndexError):
        # The last pass says what cannot be read.
        return 0
