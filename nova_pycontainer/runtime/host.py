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

"""All containers of one host: the runtime's face to its users.

The methods are the agent's verbs. Each container has a lock that a change
holds; nothing that waits for a guest's good will is done under it.
"""

import collections.abc as cabc
import contextlib
import functools
import pathlib
import sys
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import checkpoints
from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import console_log
from nova_pycontainer.runtime import consoles
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import ends
from nova_pycontainer.runtime import entries as rentries
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import events
from nova_pycontainer.runtime import execute
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime import guest_files
from nova_pycontainer.runtime import idmap
from nova_pycontainer.runtime import imagecheck
from nova_pycontainer.runtime import interfaces
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime import loading
from nova_pycontainer.runtime import machine
from nova_pycontainer.runtime.migration import checks
from nova_pycontainer.runtime.migration import preflight
from nova_pycontainer.runtime import migrations
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import oci
from nova_pycontainer.runtime import pausing
from nova_pycontainer.runtime import quiesce
from nova_pycontainer.runtime import report
from nova_pycontainer.runtime import rescue
from nova_pycontainer.runtime import snapshots
from nova_pycontainer.runtime import spec as rspec
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import stopping
from nova_pycontainer.runtime import transfers
from nova_pycontainer.runtime import volume_swap
from nova_pycontainer.runtime import volumes
from nova_pycontainer.runtime import watcher

LOG = logging.getLogger(__name__)

Info = dict[str, ty.Any]
# Within the class these names are verbs.
_Infos = list[Info]
_Argv = list[str]
_Events = list[events.Event]


Entry = rentries.Entry
_Entries = list[Entry]


#: Seconds to wait for the end of a container that has ended to be dealt with.
_END_S = 10.0


class Host:
    """The containers of this host."""

    def __init__(self, config: rconfig.Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._started = False

    def start(self) -> None:
        """Rebuild the view from disk and kernel, and clean up after a crash.

        :raises ContainerError: this host cannot run containers
        """
        c = self._config
        c.state_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        c.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        c.instances_dir.mkdir(mode=0o700, exist_ok=True)
        self._ids = idmap.IdAllocator(c.idmap_base, c.idmap_count)
        self._hierarchies = cgroup.Hierarchies()
        self._cpus = cpuset.Pool(functools.partial(
            self._hierarchies.cpus, c.cgroup_parent))
        self._oci = oci.OciRuntime(c)
        self._disk_method = disk.choose_method(c.disk_limit, c.state_dir)
        python = c.python or sys.executable
        keeper_client.ensure_keeper(c.keeper_socket, python)
        self.keeper = keeper_client.KeeperClient(
            c.keeper_socket, python=python)
        self._events = events.EventLog()
        self._ends = ends.Ends(self, self._events)
        self.layers = layers.LayerStore(
            c.layers_dir, unpack_base=self._ids.unpack_base,
            max_entries=c.layer_max_entries, max_bytes=c.layer_max_bytes,
            in_use=self._layers_in_use, python=c.python)
        self._watcher = watcher.Watcher(self._ends.exited)
        tool = criu.Criu(c.criu_path, self.keeper)
        self.checks = checks.Checks(self, c, tool)
        self.preflight = preflight.Preflight(
            c, tool, self.keeper, self._hierarchies,
            # Above the range of all containers, and that of unpacking.
            self._ids.unpack_base + idmap.RANGE)
        self.checkpoints = checkpoints.Checkpoints(self, c)
        self.interfaces = interfaces.Interfaces(self)
        self.volumes = volumes.Volumes(self)
        self.swaps = volume_swap.Swaps(self)
        self.migrations = migrations.Migrations(self, c)
        self.migrations.start()
        self.quiesces = quiesce.Quiesces(self)
        self.rescues = rescue.Rescues(self)
        self.snapshots = snapshots.Snapshots(self, c)
        self.transfers = transfers.Transfers(self)
        missing = self._hierarchies.missing()
        if missing:
            LOG.error('no cgroup hierarchy has the controllers %s: limits '
                      'of containers are NOT enforced', missing)
        for item in loading.containers(c.instances_dir, self.make):
            self._entries[item.uuid] = Entry(item)
            self._recover(item)
        self.layers.recover()  # which are in use is known now
        self.snapshots.recover()
        self.rescues.recover()
        self.transfers.recover()
        self.consoles = consoles.Consoles(
            self, consoles.load_key(c.state_dir / 'keys' / 'console.key'),
            c.console_listen, c.console_port)
        self._started = True

    def close(self) -> None:
        """Let go of everything; the containers run on."""
        if self._started:
            self._started = False
            self.quiesces.close()
            self.snapshots.close()
            self.migrations.close()
            self.consoles.close()
            self._events.close()
            self._watcher.close()

    # View

    def _recover(self, item: container.Container) -> None:
        try:
            self.checkpoints.recover(item)
            self.quiesces.recover(item)
            pidfd = item.open()
            if pidfd is not None:
                item.note_cpus()
                self.volumes.recover(item)
                self._watcher.add(item.uuid, pidfd)
                self.migrations.recover(item.uuid)
                if item.started_unnoticed():
                    self._events.add('started', item.uuid)
            else:
                self.migrations.recover(item.uuid)
                self._ends.exited(item.uuid)
                if item.uuid in self._entries and item.st.run is None:
                    # What a kill in the middle of a verb has left.
                    item.teardown()
        except (OSError, errors.ContainerError) as e:
            # One container must not keep the others from their agent.
            # Cleaning up is tried again with the next verb.
            LOG.error('cleaning up after instance %s failed: %s',
                      item.uuid, e)
        except Exception:
            # Nor may what nobody has foreseen.
            LOG.exception('cleaning up after instance %s failed', item.uuid)

    def make(self, st: state.State) -> container.Container:
        kind = rescue.Rescued if st.rescue else container.Container
        return kind(
            self._config, self._oci, self._hierarchies, self.keeper,
            self._cpus, st)

    def entry(self, uuid: str) -> Entry:
        rconfig.check_uuid(uuid)
        with self._lock:
            entry = self._entries.get(uuid)
        if entry is None:
            raise errors.ContainerError(
                'not_found', f'there is no container of instance {uuid} '
                'on this host', uuid=uuid)
        return entry

    @contextlib.contextmanager
    def locked(self, uuid: str) -> cabc.Iterator[Entry]:
        """Change a container.

        :raises ContainerError: ``not_found``; ``bad_state``: whether it runs
            on another host is not known, so nothing of it may run here
        """
        entry = self.entry(uuid)
        with entry.lock:
            entry.check_settled()
            if entry.deleted:
                raise errors.ContainerError(
                    'not_found', f'the container of instance {uuid} has '
                    'been deleted', uuid=uuid)
            # Whatever is about to change, it does not stand still for it.
            self.quiesces.over(uuid)
            try:
                yield entry
            except errors.ContainerError as e:
                e.uuid = e.uuid or uuid
                raise

    def list(self) -> _Infos:
        return [self._listed(e) for e in self.entries() if not e.deleted]

    def info(self, uuid: str) -> Info:
        return self._info(self.entry(uuid))

    def _listed(self, entry: Entry) -> Info:
        try:
            return self._info(entry)
        except Exception:
            # Whoever wants to know of the others must not go without.
            LOG.exception('instance %s cannot be looked at',
                          entry.container.uuid)
            return report.unknown(entry.container) | {
                'migration': None, 'quiesced': False}

    def _info(self, entry: Entry) -> Info:
        item = entry.container
        known = True
        if entry.rebooting or (
                item.st.run is not None and item.status() == 'stopped'):
            # It has just ended. Whether it is down or reboots is not known
            # before the end has been dealt with, and "stopped" would make
            # Nova stop a healthy machine.
            known = self._deal_with_end(entry)
        migration = entry.migration
        info = entry.container.info() | {
            'migration': migration.progress.migration if migration else None,
            'quiesced': self.quiesces.holds(item.uuid)}
        return info if known else info | {'state': 'ending'}

    def _deal_with_end(self, entry: Entry) -> bool:
        """Whoever holds one container must not hold those who look at all.

        :returns: whether it is over
        """
        if not entry.lock.acquire(timeout=_END_S):
            return False
        try:
            self._ends.exited(entry.container.uuid)
        except (OSError, errors.ContainerError) as e:
            LOG.error('instance %s: it has ended, and cannot be cleaned up: '
                      '%s', entry.container.uuid, e)
            return False
        finally:
            entry.lock.release()
        return True

    def host_info(self) -> Info:
        """What this host has. Sizes are bytes."""
        ready = self.preflight.result()
        return machine.info(self._config.state_dir) | {
            'containers': len(self._entries),
            'oci_runtime': {
                'name': self._oci.name, 'version': self._oci.version},
            'cgroup': {
                'mode': self._hierarchies.mode,
                'missing': self._hierarchies.missing()},
            'disk_limit': self._disk_method,
            'migration': self.migrations.identity(),
            'preflight': ready,
            'features': (ready or {}).get('features', {}),
        }

    # Layers

    def _layers_in_use(self) -> set[str]:
        with self._lock:
            return {key for e in self._entries.values()
                    for key in e.container.layers}

    def layer_present(self, key: str) -> bool:
        return self.layers.get(rconfig.check_layer_key(key)) is not None

    def layer_import(
        self, key: str, stream: ty.BinaryIO | cabc.Iterable[bytes], *,
        image: str, max_bytes: int | None = None,
        digest: tuple[str, str] | None = None,
    ) -> Info:
        """Unpack an image, unless it is there; see :mod:`.layers`."""
        return self.layers.import_layer(
            rconfig.check_layer_key(key), stream, image=image,
            max_bytes=max_bytes, digest=digest).to_dict()

    def layer_list(self) -> _Infos:
        return [layer.to_dict() for layer in self.layers.list()]

    def layer_delete(self, key: str) -> None:
        self.layers.delete(rconfig.check_layer_key(key))

    # Network

    def plug(self, uuid: str, nics: cabc.Sequence[Info]) -> None:
        """Make veth pairs before their container; idempotent.

        :raises ContainerError: ``network``, ``invalid``
        """
        rconfig.check_uuid(uuid)
        made = []
        try:
            for nic in [network.Nic.from_dict(n) for n in nics]:
                if network.plug(nic):
                    made.append(nic)
        except BaseException:
            for nic in made:
                network.unplug(nic.devname)
            raise

    def unplug(self, uuid: str, devnames: cabc.Sequence[str]) -> None:
        """Remove veth pairs by their outer ends; idempotent."""
        rconfig.check_uuid(uuid)
        for name in devnames:
            network.unplug(network.check_devname(name))

    # Life

    def define(
        self, uuid: str, spec: Info, *, layer_later: bool = False,
        incoming: Info | None = None,
    ) -> Info:
        """Make a container's directory and disk.

        :param layer_later: the layer need not be here yet
        :param incoming: its files come from elsewhere, see :mod:`.transfers`
        :raises ContainerError: ``exists``, ``layer_missing``, ``invalid``,
            ``no_base_id``, ``no_space``, ``file_refused``
        """
        rconfig.check_uuid(uuid)
        parsed = rspec.Spec.from_dict(spec)
        drive = spec.get('config_drive')
        files = guest_files.parse(spec.get('files') or ())
        kept = {k: v for k, v in spec.items()
                if k not in ('config_drive', 'files')}
        # The layer may not be deleted before it is known to be in use. One
        # that may come later may just be coming, which takes its time.
        guard = (contextlib.nullcontext() if layer_later or parsed.root
                 else self.layers.locked(parsed.layer))
        with guard, self._lock:
            layer = self.layers.get(parsed.layer) if parsed.layer else None
            if layer is not None:
                imagecheck.check_init(layer.root, parsed.init_argv)
            elif not layer_later and not parsed.root:
                raise self._layer_missing(uuid, parsed)
            if uuid in self._entries:
                raise errors.ContainerError(
                    'exists', 'this host has a container of it already',
                    uuid=uuid, remedy='Delete it first')
            base_id = self._ids.allocate(
                uuid,
                {*self.reserved_ids(),
                 *(e.container.st.base_id for e in self._entries.values())},
                spec.get('base_id'))
            item = self.make(state.State(
                uuid=uuid, spec=kept, base_id=base_id,
                disk_method=self._disk_method, created_at=time.time(),
                incoming=incoming))
            # Taken from now on: the id range and the name.
            entry = self._entries[uuid] = Entry(item)
            entry.lock.acquire()
        try:
            if parsed.root and not layer_later:
                self.volumes.check_alone(item)
            item.define(drive, files, layer.root if layer else (
                item.root if parsed.root and not layer_later else None))
        except BaseException:
            with self._lock:
                del self._entries[uuid]
            entry.deleted = True
            raise
        finally:
            entry.lock.release()
        return item.info()

    @staticmethod
    def _layer_missing(
        uuid: str, spec: rspec.Spec
    ) -> errors.ContainerError:
        return errors.ContainerError(
            'layer_missing', f'the layer of image {spec.image_id} is not on '
            'this host', uuid=uuid, remedy='Import the image again')

    def prepare(self, uuid: str, changes: Info | None = None) -> Info:
        """Make everything up to an init that waits to be started.

        :param changes: new values for parts of the spec: ``nics``,
            ``resources``, ``init``, ``config_drive``, ``name``, ``hostname``,
            ``nesting``, ``root`` (only its path), ``volumes``
        """
        with self.locked(uuid) as entry:
            current = entry.require('defined', 'stopped', 'suspended')
            self.snapshots.check_startable(uuid)
            if current == 'suspended':
                self.checkpoints.discard(entry.container)
            if changes:
                self.change(entry, dict(changes))
            self.prepare_again(entry)
            return entry.container.info()

    def change(self, entry: Entry, changes: Info) -> None:
        """Change parts of the spec; the caller has the lock."""
        old = entry.container
        no_drive = object()
        drive = changes.pop('config_drive', no_drive)
        unknown = set(changes) - {
            'hostname', 'init', 'name', 'nesting', 'nics', 'resources',
            'root', 'volumes'}
        if unknown:
            raise errors.ContainerError(
                'invalid', f'{sorted(unknown)} cannot be changed')
        st = old.st
        if bool(changes.get('root', st.spec.get('root'))) != bool(
                st.spec.get('root')):
            raise errors.ContainerError(
                'invalid', 'a root cannot become a volume, nor the other way '
                'round')
        new_spec = st.spec | changes
        size = rspec.Spec.from_dict(new_spec).disk_bytes
        if size != old.spec.disk_bytes:
            old.disk.resize(size)
        st.spec = new_spec
        item = self.make(st)
        if drive is not no_drive:
            item.set_config_drive(ty.cast(dict[str, str] | None, drive))
        st.save(item.directory)
        entry.container = item

    def prepare_again(self, entry: Entry) -> None:
        item = entry.container
        self.snapshots.check_startable(item.uuid)
        item.check_here()
        self.volumes.check_alone(item)
        # It is about to open the old volume again.
        self.swaps.end(item.uuid, 'the instance was started anew')
        item.prepare(self.layer_root(item))
        if item.st.kept:
            item.st.kept = False
            item.st.save(item.directory)
        self.watch(item.uuid)

    # For migrations

    def reserved_ids(self) -> dict[int, str]:
        """Ranges of ids that no container may have, and what they are for."""
        base = self._ids.unpack_base
        return {base: 'unpacking images', base + idmap.RANGE: 'preflight'}

    def layer_root(self, item: container.Container) -> pathlib.Path:
        """:raises ContainerError: ``layer_missing``"""
        if item.spec.root:
            # Its init is found where it will be mounted.
            return item.root
        layer = self.layers.get(item.spec.layer)
        if layer is None:
            raise self._layer_missing(item.uuid, item.spec)
        return layer.root

    def entries(self) -> _Entries:
        with self._lock:
            return [*self._entries.values()]

    def watch(self, uuid: str) -> None:
        """Learn of the end of a container's init."""
        pidfd = self.entry(uuid).container.open()
        if pidfd is not None:
            self._watcher.add(uuid, pidfd)
        else:
            # Sooner than one could look.
            threading.Thread(
                target=self._ends.exited, args=(uuid,), name='exited',
                daemon=True).start()

    def note(self, kind: str, uuid: str) -> None:
        """Tell those who follow the events."""
        self._events.add(kind, uuid)

    def start_container(self, uuid: str) -> Info:
        """Let a prepared container's init run."""
        with self.locked(uuid) as entry:
            entry.require('created')
            entry.container.start()
            self._events.add('started', uuid)
            return entry.container.info()

    def stop(self, uuid: str, timeout_s: float) -> Info:
        """See :func:`.stopping.stop`."""
        return stopping.stop(self, self._ends, uuid, timeout_s)

    def kill(self, uuid: str) -> Info:
        return self.stop(uuid, 0)

    def reboot(self, uuid: str, timeout_s: float,
               changes: Info | None = None) -> Info:
        """Stop, and start again; 0 seconds mean a hard reboot."""
        self.stop(uuid, timeout_s)
        with self.locked(uuid):
            self.prepare(uuid, changes)
            return self.start_container(uuid)

    def pause(self, uuid: str) -> Info:
        with self.locked(uuid) as entry:
            if entry.require('running', 'paused') == 'running':
                item = entry.container
                try:
                    pausing.freeze(item.cgroup, item.live_pid())
                    # As none reach a paused machine.
                    item.hold_network(True)
                except BaseException:
                    # In this order, and whatever the one says.
                    item.hold_network(False, lenient=True)
                    item.cgroup.freeze(False)
                    raise
                self._events.add('paused', uuid)
            return entry.container.info()

    def unpause(self, uuid: str) -> Info:
        with self.locked(uuid) as entry:
            if entry.require('running', 'paused') == 'paused':
                # First: one that is deaf and runs could not be helped.
                entry.container.hold_network(False)
                entry.container.cgroup.freeze(False)
                self._events.add('unpaused', uuid)
            return entry.container.info()

    def delete(self, uuid: str, keep_disk: bool = False) -> None:
        """Kill a container and remove all of it; idempotent.

        :param keep_disk: keep its files, as a stopped container that is
            ``kept``
        """
        try:
            entry = self.entry(uuid)
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            return
        self._abort_migration(entry)
        self.transfers.end(uuid)
        self.snapshots.abort(uuid, wait=True)
        with entry.lock:
            if entry.deleted:
                return
            self.transfers.end(uuid)
            self.snapshots.abort(uuid, wait=False)
            entry.check_settled()
            entry.stopping += 1
            try:
                faults.point('delete.begun')
                self.quiesces.over(uuid)
                self.swaps.end(uuid, 'the instance is being deleted')
                entry.container.kill()
                faults.point('delete.killed')
                self._ends.finish(entry)
                entry.container.teardown()
                faults.point('delete.torn-down')
                if keep_disk:
                    entry.container.st.kept = True
                    entry.container.st.save(entry.container.directory)
                    return
                entry.container.remove_files()
                faults.point('delete.removed')
                entry.deleted = True
            finally:
                entry.stopping -= 1
        with self._lock:
            self._entries.pop(uuid, None)

    @staticmethod
    def _abort_migration(entry: Entry) -> None:
        migration = entry.migration
        if migration is not None and not migration.committed:
            try:
                migration.abort('the instance is deleted')
            except errors.ContainerError as e:
                LOG.info('instance %s: %s', entry.container.uuid, e)

    # In the guest

    def exec(
        self, uuid: str, argv: _Argv, *, stdin: bytes = b'',
        env: dict[str, str] | None = None, timeout_s: float = 30.0,
        max_output: int = 1 << 20,
    ) -> execute.ExecResult:
        """Run a program in a running container; see :mod:`.execute`."""
        entry = self.entry(uuid)
        entry.require('running')
        return execute.run(
            entry.container, argv, stdin=stdin, env=env,
            timeout_s=timeout_s, max_output=max_output)

    def console_log(self, uuid: str, max_bytes: int = 102400) -> bytes:
        """The end of the console's output, also of a stopped container."""
        return console_log.read(self.entry(uuid).container.log, max_bytes)

    def events(self, after: int, timeout_s: float) -> _Events:
        return self._events.after(after, timeout_s)
