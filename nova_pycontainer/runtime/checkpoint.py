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

"""A container on disk: dumped with all of its memory, and restored later.

The images lie on the instance's own disk, beside its files and out of the
guest's reach. They count as its disk does.

A checkpoint is whole when :attr:`.state.State.suspended` says ``saved``,
which is written before the first process is killed, and it is valid until the
restored guest runs: its files change from then on.
"""

import contextlib
import os
import pathlib
import shutil
import threading
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import announce
from nova_pycontainer.runtime.migration import clocks
from nova_pycontainer.runtime.migration import dumping
from nova_pycontainer.runtime.migration import file_locks
from nova_pycontainer.runtime.migration import guardian
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import moment
from nova_pycontainer.runtime.migration import network_lock
from nova_pycontainer.runtime.migration import recovery
from nova_pycontainer.runtime.migration import restoring
from nova_pycontainer.runtime.migration import room
from nova_pycontainer.runtime.migration import undumpable
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import syscalls
from nova_pycontainer.runtime import unpack_client

LOG = logging.getLogger(__name__)

#: CRIU works this long between two notifications at most: the pages go to a
#: disk.
_CRIU_TIMEOUT = 1800.0
_FACTS = 'dumped.json'


def release(directory: pathlib.Path) -> None:
    """Unmount what a CRIU that was killed has left there; idempotent.

    It mounts the hierarchies of cgroups in its directory to restore from
    them. Removed with the rest they would take the host's cgroups along.
    """
    for mount in reversed(guest.mounts(os.getpid())):
        if pathlib.PurePath(mount.point).is_relative_to(directory):
            syscalls.umount(
                mount.point, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)


def remove(directory: pathlib.Path) -> None:
    """Remove the images; idempotent."""
    if directory.exists():
        release(directory)
        shutil.rmtree(directory)


class Saver:
    """Dumps one running container.

    :param directory: for the images; it is made
    """

    def __init__(
        self, item: container.Container, tool: criu.Criu,
        directory: pathlib.Path,
    ) -> None:
        self._item = item
        self._criu = tool
        self._directory = directory
        assert item.st.run is not None
        self._pid = int(item.st.run['process']['pid'])
        self._moment = moment.Moment(
            item.cgroup, item.root, item.unread)
        self._moment.drops = True
        self._saved = False

    def run(self, commit: ty.Callable[[], None]) -> None:
        """Dump and kill it.

        :param commit: called when the checkpoint is whole; the container is
            killed next. If it raises, the guest goes on
        :raises ContainerError: the guest goes on as if nothing had happened,
            and there is no checkpoint
        """
        try:
            dumping.retried(
                self._item.uuid, lambda: self._dump(commit),
                threading.Event(), final=lambda: self._saved)
        except BaseException:
            if not self._saved:
                remove(self._directory)
            raise

    def _dump(self, commit: ty.Callable[[], None]) -> None:
        item = self._item
        remove(self._directory)
        self._directory.mkdir(mode=0o700)
        # What the guest has written needs not wait for the disk while it is
        # frozen. And the kernel tells of a page that could not be written
        # only once, maybe much later: that shall not be the checkpoint's.
        with contextlib.suppress(OSError):
            unpack_client.sync_filesystem(self._directory)
        external = guest.external_mounts(self._pid, item.nodes)
        facts: dict[str, ty.Any] = {
            'external': external, 'run': item.st.run}
        dumping.check_network(item, self._pid)
        undumpable.check(item, self._pid)

        def notified(script: criu.Script) -> None:
            if script.name == 'network-lock':
                faults.point('suspend.frozen')
                self._moment.frozen(self._pid)
                facts.update(dumping.network_facts(item, self._pid))
                facts['ramfs'] = guest.save_ramfs(self._pid)
            elif script.name == 'network-unlock':
                # CRIU gives up; the processes have to be set right before
                # they run.
                self._freeze()
                if not self._saved:
                    network_lock.unblock(self._pid)
            elif script.name == 'post-dump':
                # From here no death of CRIU's can let the guest run.
                self._freeze()
                facts['cgroups'] = guest.save_cgroups(item.cgroup)
                facts['moment'] = self._moment.dumped()
                faults.point('suspend.dumped')
                self._write(facts)
                # If this agent dies, CRIU gives up and lets the sockets go.
                # They would acknowledge what is not in the checkpoint.
                network_lock.block(self._pid)
                # While the kernel takes its namespace down, the lock goes
                # before the interfaces; what still comes then would be
                # answered by a reset.
                self._item.hold_network(True, lenient=True)
                commit()
                self._saved = True
                faults.point('suspend.saved')

        with self._criu.session() as session:
            self._moment.before(self._pid, False)
            options = dumping.options(
                self._criu, item, self._directory, external, self._pid)
            try:
                response = session.request(
                    self._criu.rpc.DUMP, options, notified, _CRIU_TIMEOUT)
            except BaseException as e:
                if self._saved:
                    # CRIU was to kill what its owner kills now.
                    LOG.warning('instance %s: %s', item.uuid, e)
                    return
                self._thaw()
                if isinstance(e, OSError) and e.errno in errors.FULL:
                    raise self._full(str(e)) from e
                raise
        if response.success or self._saved:
            LOG.info('instance %s: criu dumped it in %.3f s', item.uuid,
                     session.worked)
            return
        self._thaw()
        self._raise_full()
        raise criu.failed(
            'the instance cannot be dumped', item.uuid, 'dump',
            self._directory / 'criu.log', item.log_directory, response,
            'Stop what is named, or stop the server instead')

    def _raise_full(self) -> None:
        """:raises ContainerError: ``no_space``, if that was the reason"""
        free = room.free_if_full(self._directory)
        if free is not None:
            raise self._full(f'{free >> 20} MiB are free')

    def _full(self, cause: str) -> errors.ContainerError:
        return errors.ContainerError(
            'no_space', 'the memory of the instance does not fit on its '
            'disk', uuid=self._item.uuid, step='dump', cause=cause,
            remedy='Delete files in the server, or resize it to a flavor '
            'with more disk')

    def _write(self, facts: dict[str, ty.Any]) -> None:
        state.write_json(
            self._directory / _FACTS, {'format': state.FORMAT, **facts})
        unpack_client.sync_filesystem(self._directory)

    def _freeze(self) -> None:
        (self._item.cgroup.v2 / 'cgroup.freeze').write_text('1')

    def _thaw(self) -> None:
        self._moment.given_up(self._pid)
        recovery.thaw(self._item, False)


class Restorer:
    """Restores one container; what it needs on the host is made here.

    :param layer: root directory of the image's layer
    """

    def __init__(
        self, item: container.Container, layer: pathlib.Path,
        tool: criu.Criu, directory: pathlib.Path,
    ) -> None:
        self._item = item
        self._layer = layer
        self._criu = tool
        self._directory = directory
        self._unowned = False
        self._dumped: dict[str, ty.Any] = {}
        self._running = self._resumed = False
        self._guardian: guardian.Guardian | None = None

    def run(
        self, begin: ty.Callable[[int], None],
        commit: ty.Callable[[], None],
    ) -> None:
        """Restore it and let it run.

        :param begin: called with the pid of CRIU, which must not outlive a
            next try
        :param commit: called when it is about to run, and its images are
            worth nothing any more
        :raises ContainerError: nothing runs, and nothing is left but the
            checkpoint
        """
        item = self._item
        self._commit = commit
        with contextlib.ExitStack() as stack:
            stack.callback(item.teardown)
            item.disk.mount()
            stack.callback(release, self._directory)
            self._read()
            for nic in item.spec.nics:
                network.plug(nic)
            item.take_cpus()
            procs = item.cgroup.create_legacy(item.limits)
            self._guardian = guardian.Guardian(self._criu, item.cgroup)
            stack.callback(self._guardian.close)
            self._session = stack.enter_context(self._criu.session(
                cgroup_procs=procs, fds=self._guardian.fds))
            stack.callback(self._session.wait)
            self._guardian.given()
            begin(self._session.pid)
            self._filler = guest.RamfsFiller()
            try:
                self._restore()
            finally:
                self._filler.close()
            self._session.__exit__()
            self._guardian.close()
            stack.pop_all()

    def _read(self) -> None:
        try:
            self._dumped = state.read_json(self._directory / _FACTS)
        except FileNotFoundError as e:
            raise errors.ContainerError(
                'internal', 'the checkpoint of the instance is gone',
                uuid=self._item.uuid,
                remedy='Reboot the server hard: it starts afresh') from e

    def _restore(self) -> None:
        item = self._item
        moment_ = self._dumped['moment']
        images = self._work_on_copy()
        self._unowned = restoring.mend(
            images, self._criu.messages(), moment_)
        item.mount_root(self._layer)
        restoring.make_surroundings(item, self._dumped)
        notified = restoring.Notified(
            self, self._dumped, self._item,
            file_locks.read(images, self._criu.messages()))
        try:
            response = self._session.request(
                self._criu.rpc.RESTORE,
                restoring.options(self._criu, item, images, self._dumped),
                notified.notified, _CRIU_TIMEOUT)
        except BaseException as e:
            if not self._running:
                raise
            LOG.warning('instance %s: %s', item.uuid, e)
            response = None
        finally:
            notified.close()
        if response is not None and not response.success and (
                not self._running):
            raise criu.failed(
                'the instance cannot be restored', item.uuid, 'restore',
                images / 'restore.log', item.log_directory, response,
                'Run "pycontainer preflight" on this host, or reboot the '
                'server hard: it starts afresh')
        if not self._resumed:
            # The guest is traced for as long as CRIU is there.
            self._session.kill()
            self._session.wait()
            try:
                notified.resume()
            except Exception:
                # There is no way back.
                LOG.exception('instance %s: it runs', item.uuid)
        LOG.info('instance %s: criu restored it in %.3f s', item.uuid,
                 self._session.worked)

    def _work_on_copy(self) -> pathlib.Path:
        """A directory of the images that can be corrected.

        What is corrected is small and gets new contents; the pages are as
        they were dumped, so that they are one file by two names. A restore
        that fails leaves the checkpoint as it was.
        """
        work = self._directory / 'work'
        remove(work)
        # What CRIU restores opens its images from below, and has an id of
        # the guest's by then; nobody gets through the directories above.
        work.mkdir(mode=0o755)
        for path in self._directory.glob('*.img'):
            if path.name.startswith('pages-'):
                os.link(path, work / path.name)
            else:
                shutil.copyfile(path, work / path.name)
        return work

    # The restore's owner

    def begun(self, pid: int) -> None:
        pass

    def fill(self, pid: int, saved: list[dict[str, ty.Any]]) -> None:
        self._filler.fill(pid, saved, self._item.st.base_id)

    def ask(self) -> None:
        raise AssertionError('the pages are all here')

    def ready(self, pid: int, master: int | None) -> None:
        item = self._item
        assert self._guardian is not None
        try:
            faults.point('resume.rebuilt')
            self._guardian.freeze()
            faults.point('resume.restored')
            clocks.restore(
                pid, item.cgroup, self._dumped['moment']['timers'])
            item.adopt(
                pid, self._dumped['run'], master, unowned=self._unowned)
            faults.point('resume.adopted')
            item.hold_network(False)
            # Before the first of its instructions: whatever dies from here,
            # it must not begin a second time with what was saved.
            self._commit()
        except BaseException:
            # CRIU does not heed a refusal at this moment. Its connections
            # are to be there at the next try.
            item.hold_network(True, lenient=True)
            item.cgroup.kill()
            self._session.kill()
            raise
        self._running = True
        faults.point('resume.committed')

    def resumed(self, pid: int) -> None:
        self._resumed = True
        try:
            (self._item.cgroup.v2 / 'cgroup.freeze').write_text('0')
        except OSError as e:
            # It has ended meanwhile, which is seen elsewhere.
            LOG.warning('instance %s: %s', self._item.uuid, e)
        announce.announce(self._item, pid)
