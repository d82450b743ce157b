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

"""One container: the steps that make, start and take it down.

No locking here and no registry: :mod:`nova_pycontainer.runtime.host` calls
these methods one at a time for each container.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import blockio
from nova_pycontainer.runtime import bootvolume
from nova_pycontainer.runtime import bundle
from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import guest_files
from nova_pycontainer.runtime import init as initd
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import lxcfs
from nova_pycontainer.runtime import namespaces
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import oci
from nova_pycontainer.runtime import overlay
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import report
from nova_pycontainer.runtime import revert
from nova_pycontainer.runtime import spec as rspec
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import syscalls
from nova_pycontainer.runtime import terminal
from nova_pycontainer.runtime import trees
from nova_pycontainer.runtime import volume

LOG = logging.getLogger(__name__)

#: Seconds for the last processes to die after SIGKILL.
KILL_TIMEOUT = 30.0


class Container:
    """A container in its directory. ``st`` is what is on disk of it."""

    #: Where a root is mounted that is shown in the container.
    rescued: pathlib.Path | None = None
    #: It is frozen for a moment, and runs for everybody who asks.
    held = False

    def __init__(
        self,
        config: rconfig.Config,
        runtime: oci.OciRuntime,
        hierarchies: cgroup.Hierarchies,
        keeper: keeper_client.KeeperClient,
        pool: cpuset.Pool,
        st: state.State,
    ) -> None:
        self._config = config
        self._oci = runtime
        self._h = hierarchies
        self._keeper = keeper
        self._pool = pool
        self.st = st
        self.uuid = st.uuid
        self.spec = rspec.Spec.from_dict(st.spec)
        self.directory = config.instances_dir / st.uuid
        self.root = config.run_dir / 'root' / st.uuid
        self.log = self.directory / 'console.log'
        self.log_bytes = config.console_log_bytes
        #: Logs that outlive the instance on this host.
        self.log_directory = config.state_dir / 'logs'
        self.exit_file = self.directory / 'exit.json'
        self.unread = self.directory / 'unread.json'
        self.config_drive = self.directory / 'config-drive'
        #: Where the guest's mount of it comes from.
        self.drive_source = config.run_dir / 'root' / f'{st.uuid}.drive'
        self.nodes = volume.Nodes(
            config.run_dir / 'root' / f'{st.uuid}.dev', st.base_id)
        self.lxcfs = lxcfs.Lxcfs(config.lxcfs_dir)
        self.bundle = config.run_dir / 'bundle' / st.uuid
        self._console_socket = config.run_dir / 'console' / f'{st.uuid}.sock'
        self.disk = self._own_root()
        self.cgroup = cgroup.Cgroup(
            hierarchies,
            (st.run or {}).get('cgroup') or
            f'{config.cgroup_parent}/{st.uuid}')

    def _own_root(self) -> disk.Disk:
        if self.spec.root is not None:
            return bootvolume.BootVolume(
                self.directory, self.spec.root, self.st.base_id,
                self._config.volume_filesystems, self.root)
        return disk.Disk(
            self.directory, self.st.disk_method, self.st.base_id,
            self.spec.disk_bytes)

    # What it is

    @property
    def layers(self) -> set[str]:
        """Keys of the layers that it needs."""
        return {self.spec.layer} - {''}

    @property
    def limits(self) -> cgroup.Limits:
        """Those of its spec, with the CPUs that it has taken."""
        return dataclasses.replace(
            self.spec.limits, cpus=self._pool.of(self.uuid))

    def process(self) -> process.ProcessId | None:
        run = self.st.run
        return process.ProcessId.from_dict(run['process']) if run else None

    def open(self) -> int | None:
        """A pidfd of the running init, or None."""
        ident = self.process()
        return ident.open() if ident else None

    def status(self) -> str:
        """The state, by the kernel: created, running, paused, or not there.
        """
        fd = self.open()
        # Not while it is saved yet, or is saved no more.
        if fd is None and (self.st.suspended or {}).get('phase') in (
                'saved', 'restoring', 'undecided'):
            return 'suspended'
        if fd is None:
            ran = self.st.exit or self.st.run or self.st.moved
            return 'stopped' if ran else 'defined'
        try:
            if process.exited(fd):
                return 'stopped'
        finally:
            os.close(fd)
        assert self.st.run is not None
        if self.st.run['started_at'] is None:
            return 'created'
        if self.cgroup.frozen() and not self.held:
            return 'paused'
        return 'running'

    def live_pid(self) -> int | None:
        """Pid of the init, if there is one."""
        if self.status() not in ('created', 'running', 'paused'):
            return None
        assert self.st.run is not None
        return int(self.st.run['process']['pid'])

    def info(self) -> dict[str, ty.Any]:
        """See :func:`.report.of`."""
        return report.of(self)

    # Making it

    def define(
        self, config_drive: ty.Mapping[str, str] | None,
        files: cabc.Sequence[guest_files.File] = (),
        layer: pathlib.Path | None = None,
    ) -> None:
        """Make the directory, the disk and ``state.json``; all or nothing.

        :param files: to be in its root beside those of the image
        :param layer: as for :meth:`prepare`; None: it comes later
        """
        with revert.Reverter(self.uuid) as r:
            with r.step('instance-directory'):
                self._make_directory()
            with r.step('disk', self.remove_files):
                self.disk.create()
            with r.step('config-drive'):
                self.set_config_drive(config_drive)
            with r.step('state'):
                self.st.save(self.directory)
            # Known from here on, so that what is mounted goes after a kill.
            with r.step('files', self.unmount_root):
                if layer is not None and (files or self.spec.root):
                    self._write_files(files, layer)
            r.success()

    def _write_files(
        self, files: cabc.Sequence[guest_files.File], layer: pathlib.Path
    ) -> None:
        """Write into the root, which is mounted only for that.

        Not when it starts: a server may be moved before it ever does.
        """
        self.disk.mount()
        try:
            self._show_root(layer)
            self._check_root()
            guest_files.write(self.root, files, self.st.base_id)
        finally:
            overlay.unmount(self.root)
            self.disk.unmount()

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700)
        except FileExistsError:
            # Not ours, and not ours to remove.
            raise errors.ContainerError(
                'exists', f'{self.directory} is there already',
                uuid=self.uuid,
                remedy='Move it away, and try again') from None

    def set_config_drive(self, files: ty.Mapping[str, str] | None) -> None:
        if self.config_drive.exists():
            shutil.rmtree(self.config_drive)
        if files is None:
            return
        self.config_drive.mkdir(mode=0o755)
        rspec.write_config_drive(self.config_drive, files)
        for path in (self.config_drive, *self.config_drive.rglob('*')):
            os.chown(path, self.st.base_id, self.st.base_id)

    def prepare(self, layer: pathlib.Path) -> None:
        """Make everything up to an init that waits to be started.

        :param layer: root directory of the image's layer, or the place of the
            root if that is a volume
        """
        with contextlib.ExitStack() as stack, (
                revert.Reverter(self.uuid)) as r:
            with r.step('mount-disk', self.disk.unmount):
                self.disk.mount()
            with r.step('mount-root', self.unmount_root):
                self.mount_root(layer)
            with r.step('cpus', self._give_cpus_back):
                self.take_cpus()
            with r.step('init'):
                self._check_root()
                init = initd.make(
                    layer, self.uuid, argv=self.spec.init_argv,
                    env=self.spec.init_env,
                    stop_signal=self.spec.stop_signal)
            with r.step('cgroup', self.cgroup.remove):
                procs = self.cgroup.create_legacy(self.limits)
            with r.step('bundle', self._remove_bundle):
                self._write_bundle(init, self._namespaces(stack))
            with r.step('create', self._remove_from_runtime):
                pid, master = terminal.receive(
                    self._console_socket, lambda: self._oci.create(
                        self._keeper, self.uuid, self.bundle,
                        self._console_socket, self.bundle / 'pid',
                        [str(p) for p in procs]))
            try:
                with r.step('guest-files'):
                    if init.kind is initd.Kind.SYSTEMD:
                        self._write_drop_ins(pid)
                with r.step('console', self._release_console):
                    self._keeper.hold(
                        self.uuid, master, str(self.log),
                        self.log_bytes, fresh=True)
            finally:
                os.close(master)
            with r.step('network', self.unplug_all):
                self._wire(pid)
                self._allow_ping(pid)
            with r.step('watch'):
                self.exit_file.unlink(missing_ok=True)
                self._watch(pid)
            with r.step('io-limits'):
                # systemd chooses the place of a scope itself.
                cgroup.Cgroup(self._h, cgroup.of_process(
                    pid, self._h)).limit_io(self.disks(), self.spec.limits)
            # Last: from then on it has run.
            with r.step('record'):
                self.st.run = {
                    'process': process.ProcessId.of(pid).to_dict(),
                    'cgroup': cgroup.of_process(pid, self._h),
                    'started_at': None,
                    'init': {
                        'kind': str(init.kind),
                        'stop_signal': init.stop_signal,
                        'stop_argv': init.stop_argv},
                }
                self.st.exit = None
                self.st.save(self.directory)
                self._set_cgroup()
            r.success()

    def take_cpus(self) -> None:
        """Have CPUs chosen for it, until it is torn down.

        :raises ContainerError: ``unsupported``
        """
        self._pool.take(self.uuid, self.spec.cpus, self.spec.vcpus)

    def _give_cpus_back(self) -> None:
        self._pool.give_back(self.uuid)

    def note_cpus(self) -> None:
        """It runs already: it has what the kernel says."""
        found = self.cgroup.cpus()
        if found is not None:
            self._pool.note(self.uuid, found, self.spec.vcpus)

    def disks(self, *more: volume.Volume) -> list[str]:
        """The disks that its limits hold for; its root is mounted.

        :param more: volumes that it is about to have
        :raises ContainerError: ``unsupported``: the limits on that cannot
            hold
        """
        found: list[str] = []
        if not self.spec.limits.io:
            return found
        for device in (os.stat(self.root if self.spec.root else
                               self.disk.upper).st_dev,
                       *map(volume.device_of, (*self.spec.volumes, *more))):
            disk_of = blockio.disk_of(device)
            if disk_of is None:
                raise errors.ContainerError(
                    'unsupported', 'the file system of the host\'s instances '
                    'is on no single disk, so that limits on what is read '
                    'and written cannot hold', uuid=self.uuid,
                    remedy='Set [pycontainer]disk_limit = loop, or use a '
                    'flavor without quota:disk_*')
            found.append(disk_of)
        return found

    def limit_io(self, *more: volume.Volume) -> None:
        self.cgroup.limit_io(self.disks(*more), self.spec.limits)

    def _watch(self, pid: int) -> None:
        """Have the end of the init written down."""
        try:
            start_time = process.ProcessId.of(pid).start_time
        except ProcessLookupError:
            # It has ended already, and the keeper knows how.
            start_time = None
        self._keeper.watch(
            self.uuid, pid, str(self.exit_file), start_time)

    def mount_root(self, layer: pathlib.Path) -> None:
        self._show_root(layer)
        if self.config_drive.exists():
            overlay.bind(self.config_drive, self.drive_source)
        self.nodes.make(self.devices())
        self.nodes.make_fuse()

    def devices(self) -> tuple[volume.Volume, ...]:
        """The volumes whose devices it has."""
        return self.spec.volumes

    def _show_root(self, layer: pathlib.Path) -> None:
        self.root.parent.mkdir(mode=0o711, exist_ok=True)
        self.disk.show(self.root, layer)

    def _check_root(self) -> None:
        """Look whether there is an init, where that may have changed.

        :raises ContainerError: ``volume_unusable``
        """
        if isinstance(self.disk, bootvolume.BootVolume):
            self.disk.check_init(self.root, self.spec.init_argv)

    def unmount_root(self) -> None:
        self.nodes.unmount()
        overlay.unmount(self.drive_source)
        overlay.unmount(self.root)

    def _set_cgroup(self) -> None:
        # systemd chooses the place of a scope itself.
        assert self.st.run is not None
        self.cgroup = cgroup.Cgroup(self._h, self.st.run['cgroup'])

    def _namespaces(self, stack: contextlib.ExitStack) -> str | None:
        """Make those that the OCI runtime is to join, if it can.

        The guest's clocks begin with it, as those of a machine do, so that
        what it sees of its uptime and of its processes' starts is its own. It
        stays so in a migration, which keeps what the clocks show.

        :param stack: keeps them
        """
        if not self._oci.time_namespaces:
            return None
        return stack.enter_context(
            namespaces.user_and_time(self.st.base_id))

    def _write_bundle(
        self, init: initd.Init, joined: str | None
    ) -> None:
        # A bundle without a container is of no use after a reboot of the
        # host, so it lies with the volatile things.
        self.bundle.mkdir(mode=0o700, parents=True, exist_ok=True)
        document = bundle.make(
            uuid=self.uuid,
            hostname=self.spec.hostname,
            root=self.root,
            base_id=self.st.base_id,
            init=init,
            cgroups_path=self._oci.cgroups_path(
                self._config.cgroup_parent, self.uuid),
            resources=self.cgroup.oci_resources(
                self.limits, self.disks()),
            config_drive=(
                self.drive_source if self.config_drive.exists() else None),
            nesting=self.spec.nesting,
            rescued=self.rescued,
            nodes=[*map(self.nodes.path, self.devices()),
                   *([self.nodes.fuse] if self.nodes.fuse.exists() else [])],
            joined=joined,
            shares=self.lxcfs.files())
        (self.bundle / 'config.json').write_text(json.dumps(document))

    def _write_drop_ins(self, pid: int) -> None:
        """Write into the guest's /run before its init runs."""
        # The tmpfs belongs to the guest's user namespace.
        with syscalls.files_of(self.st.base_id):
            guest_files.write(
                pathlib.Path(f'/proc/{pid}/root'),
                [guest_files.File(path, content.encode())
                 for path, content in initd.SYSTEMD_DROP_INS],
                self.st.base_id)

    def _wire(self, pid: int) -> None:
        for position, nic in enumerate(self.spec.nics):
            if network.exists(nic) and not network.parked(nic):
                # An outer end whose inner end is in a namespace that is
                # being destroyed.
                network.unplug(nic.devname)
            network.plug(nic)
            network.move_in(nic, pid, f'eth{position}')

    def adopt(
        self, pid: int, run: ty.Mapping[str, ty.Any], master: int | None,
        unowned: bool = False,
    ) -> None:
        """Take over a restored container as one's own.

        :param run: the facts of the run on the host that it comes from
        :param master: of its console's pty; None: no process has it open
        :param unowned: the console was the terminal of no session
        """
        if master is None:
            master = terminal.make_first(pid)
        else:
            master = os.dup(master)
        try:
            self._keeper.hold(
                self.uuid, master, str(self.log), self.log_bytes,
                fresh=unowned)
        finally:
            os.close(master)
        self.exit_file.unlink(missing_ok=True)
        self._watch(pid)
        self.st.run = {
            'process': process.ProcessId.of(pid).to_dict(),
            'cgroup': self.cgroup.path,
            'started_at': run['started_at'],
            'init': run['init'],
        }
        self.st.exit = None
        self.st.save(self.directory)

    def _allow_ping(self, pid: int) -> None:
        """Let all users of the guest ping, as distributions do.

        systemd's own setting names groups up to 2^31, which do not exist in
        the guest's user namespace, so that the kernel refuses it.
        """
        first = self.st.base_id
        namespaces.within('net', pid, lambda: pathlib.Path(
            '/proc/sys/net/ipv4/ping_group_range').write_text(
                f'{first} {first + 65534}'))

    def start(self) -> None:
        """Let the init run."""
        assert self.st.run is not None
        faults.point('start.created')
        try:
            self._oci.start(self.uuid)
        except errors.ContainerError:
            # Killed or late, it may have done it all the same.
            if self._oci.waits(self.uuid):
                raise
        try:
            faults.point('start.running')
        finally:
            self._note_start()

    def check_here(self) -> None:
        """Whether all of it is here, and only this host may have it.

        :raises ContainerError: ``bad_state``
        """
        if self.st.moved:
            raise errors.ContainerError(
                'bad_state', 'the instance has moved to another host and '
                'runs there', uuid=self.uuid,
                remedy='Delete what is left of it here')
        if self.st.incoming:
            raise errors.ContainerError(
                'bad_state', 'the files of the instance have not all come '
                'from the host that it is moved from', uuid=self.uuid,
                remedy='Reboot the server hard, which tries it again')
        if self.st.offered:
            raise errors.ContainerError(
                'bad_state', 'the instance is being moved to another host',
                uuid=self.uuid,
                remedy='Confirm or revert its migration first')

    def started_unnoticed(self) -> bool:
        """Note a start that nobody lived to write down.

        :returns: whether there was one
        """
        if (self.status() != 'created' or self._oci.waits(self.uuid)):
            return False
        self._note_start()
        return True

    def _note_start(self) -> None:
        assert self.st.run is not None
        self.st.run['started_at'] = time.time()
        self.st.save(self.directory)
        faults.point('start.recorded')

    def hold_network(self, on: bool, *, lenient: bool = False) -> None:
        """Keep frames from it, or let them pass again; idempotent.

        Its network stack is the kernel's, which is not stopped with it, and
        would go on answering.

        :param lenient: what cannot be done to one interface is passed over
        :raises ContainerError: ``network``
        """
        for nic in self.spec.nics:
            try:
                network.hold(nic, on)
            except (errors.ContainerError, OSError):
                if not lenient:
                    raise

    # Taking it down

    def kill(self) -> None:
        """Kill every process and wait until the init is gone.

        :raises ContainerError: ``timeout``
        """
        fd = self.open()
        if fd is None:
            return
        try:
            self.cgroup.kill()
            # The init's own death is enough: the kernel kills the whole PID
            # namespace with it.
            process.send_signal(fd, 9)
            if not process.exited(fd, KILL_TIMEOUT):
                raise errors.ContainerError(
                    'timeout',
                    f'the container did not die within {KILL_TIMEOUT:.0f} s '
                    'of SIGKILL', uuid=self.uuid,
                    remedy='A process waits in the kernel for a device or a '
                           'network file system; see its stack in /proc')
        finally:
            os.close(fd)

    def read_exit(self) -> state.Exit:
        """How the init ended, from what the keeper wrote."""
        deadline = time.monotonic() + 2.0
        while True:
            try:
                ended = state.Exit.from_dict(
                    state.read_json(self.exit_file))
                break
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    ended = state.Exit()
                    break
                time.sleep(0.01)
        with contextlib.suppress(OSError):
            ended.oom = self.cgroup.usage().oom_kills > 0
        return ended

    def teardown(self) -> None:
        """Remove all that a container needs while it lives; idempotent."""
        # Whatever is still in there has lost its init, or was never
        # recorded: a half-made or half-restored container.
        self.cgroup.kill()
        self._remove_from_runtime()
        self._release_console()
        self.unmount_root()
        self.disk.unmount()
        self.cgroup.remove()
        self._give_cpus_back()
        self._remove_bundle()
        self.unplug_all()

    def unplug_all(self) -> None:
        """Remove the veth pairs.

        The kernel destroys them with the namespace, but some time later; a
        pair of the same name could not be made until then.
        """
        for nic in self.spec.nics:
            network.unplug(nic.devname)

    def _remove_from_runtime(self) -> None:
        if (self._config.oci_root / self.uuid).exists():
            self._oci.delete(self.uuid)

    def _remove_bundle(self) -> None:
        shutil.rmtree(self.bundle, ignore_errors=True)

    def _release_console(self) -> None:
        try:
            self._keeper.release(self.uuid)
        except errors.ContainerError as e:
            if e.code not in ('not_found', 'keeper_unavailable'):
                raise
        # Of an agent that was killed while it waited for a console there.
        self._console_socket.unlink(missing_ok=True)

    def remove_files(self) -> None:
        """Delete the instance's directory; idempotent."""
        self.disk.unmount()
        self.disk.clear_limit()
        if self.directory.exists():
            trees.remove(self.directory)
