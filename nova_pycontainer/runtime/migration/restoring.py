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

"""Restoring a container, wherever its images come from: another host, or a
checkpoint on disk.

What a dump gives beside CRIU's images is called ``dumped`` here:

``external``
    mounts of the host, see :func:`.guest.external_mounts`
``cgroups``, ``ramfs``, ``neighbours``
    what CRIU leaves to us, of :mod:`.guest` and :mod:`.neighbours`
``netdevs``
    of :func:`.network.names_inside`
``addresses``
    of :func:`.gone_addresses.find`
``moment``
    of :class:`.moment.Moment`
"""

import collections.abc as cabc
import os
import pathlib
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime.migration import exe_links
from nova_pycontainer.runtime.migration import file_locks
from nova_pycontainer.runtime.migration import gone_addresses
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import neighbours
from nova_pycontainer.runtime.migration import netlink_options
from nova_pycontainer.runtime.migration import network_lock
from nova_pycontainer.runtime.migration import open_shares
from nova_pycontainer.runtime.migration import overruns
from nova_pycontainer.runtime.migration import packet_sockets
from nova_pycontainer.runtime.migration import patches
from nova_pycontainer.runtime.migration import terminals
from nova_pycontainer.runtime import network

LOG = logging.getLogger(__name__)

Dumped = cabc.Mapping[str, ty.Any]


def mend(
    images: pathlib.Path, messages: types.ModuleType, moment: Dumped
) -> bool:
    """Correct in the images what CRIU's dump gets wrong.

    :returns: whether the console was the terminal of no session
    """
    patches.Patches(
        images, messages, moment['asleep'], moment['signals']).apply()
    exe_links.mend(images, messages)
    packet_sockets.mend(images, messages)
    open_shares.mend(images, messages)
    return terminals.mend(
        images, messages,
        {int(index): (int(session), int(foreground))
         for index, session, foreground in moment.get('terminals', ())})


def make_surroundings(item: container.Container, dumped: Dumped) -> None:
    """Make the cgroups, and stop the network; the root is mounted.

    :raises ContainerError: ``invalid``
    """
    item.cgroup.create_v2(item.limits)
    # CRIU moves the init into it to make the cgroup namespace.
    guest.make_cgroups(
        item.cgroup, dumped['cgroups'], item.st.base_id, occupied=True)
    item.limit_io()
    # Everything that a peer sends to it before it runs would be answered by a
    # reset.
    item.hold_network(True)


def options(
    tool: criu.Criu, item: container.Container, images: pathlib.Path,
    dumped: Dumped,
) -> ty.Any:
    """The ``criu_opts`` of the restore.

    :raises ContainerError: ``invalid``
    """
    made = tool.options(criu.Options(
        images=images, root=item.root,
        external=guest.restore_externals(
            dumped['external'], item.drive_source,
            _interfaces(item, dumped), item.nodes, item.lxcfs),
        cgroup='/' + item.cgroup.path, log='restore.log'))
    # The keeper's child, as one that the OCI runtime has made.
    made.rst_sibling = True
    return made


def _interfaces(
    item: container.Container, dumped: Dumped
) -> dict[str, str]:
    names = dumped.get('netdevs')
    if names is None:
        # An older agent's dump: they are called as we have called them.
        names = {nic.id: f'eth{position}'
                 for position, nic in enumerate(item.spec.nics)}
    return {network.check_name_inside(names[nic.id]): nic.parked_name
            for nic in item.spec.nics if nic.id in names}


class Owner(ty.Protocol):
    """Who restores. Each method may refuse by raising."""

    def begun(self, pid: int) -> None:
        """CRIU has made the guest's init, which is nowhere yet."""

    def fill(self, pid: int, saved: list[dict[str, ty.Any]]) -> None:
        """Mounts are made, and the ramfs ones empty."""

    def ask(self) -> None:
        """What comes now needs pages that another host has yet to send."""

    def ready(self, pid: int, master: int | None) -> None:
        """Everything is restored and nothing has run.

        The owner has to freeze it: no death of CRIU's may let it run.

        :param master: of the console's pty; None: no process has it open
        """

    def resumed(self, pid: int) -> None:
        """Nobody traces it any more: it can run."""


class Notified:
    """Answers to CRIU's notifications while it restores."""

    def __init__(
        self, owner: Owner, dumped: Dumped, item: container.Container,
        locks: list[file_locks.Lock],
    ) -> None:
        self._owner = owner
        self._item = item
        self._locks = locks
        self._cgroups = dumped['cgroups']
        self._netlink = list(dumped['moment'].get('netlink') or ())
        self._dropped = list(dumped['moment'].get('dropped') or ())
        self._ramfs = list(dumped['ramfs'])
        self._neighbours = list(dumped.get('neighbours') or ())
        self._addresses = list(dumped.get('addresses') or ())
        self._lazy = bool(dumped.get('lazy'))
        self._pid: int | None = None
        self._master: int | None = None
        self._ready = False

    def close(self) -> None:
        if self._master is not None:
            os.close(self._master)
            self._master = None

    def resume(self) -> None:
        """What is left to do when CRIU has let go of the guest."""
        assert self._pid is not None
        network_lock.unblock(self._pid)
        file_locks.restore(self._item.cgroup, self._locks, self._lazy)
        self._owner.resumed(self._pid)

    def notified(self, script: criu.Script) -> None:
        if script.fd is not None:
            # The last one is the console: it is the first terminal of the
            # guest, and CRIU opens the higher numbers first.
            self.close()
            self._master = script.fd
        if script.name == 'setup-namespaces':
            assert script.pid is not None
            self._pid = script.pid
            self._owner.begun(script.pid)
        elif script.name == 'post-setup-namespaces':
            assert self._pid is not None
            # The init is in the cgroup below that it belongs to. The guest's
            # systemd watches files that only a controller's cgroups have.
            if guest.has_controllers(self._cgroups):
                guest.make_cgroups(
                    self._item.cgroup, self._cgroups, self._item.st.base_id)
            self._owner.fill(self._pid, self._ramfs)
            gone_addresses.lend(self._pid, self._addresses)
            if self._lazy:
                # What comes now needs pages, and the source sends none
                # before its commit. Namespaces, mounts and network, which
                # most failures are about, are made.
                self._owner.ask()
        elif script.name == 'post-restore':
            assert self._pid is not None
            gone_addresses.take_back(self._pid, self._addresses)
            neighbours.restore(self._pid, self._neighbours)
            netlink_options.restore(self._item.cgroup, self._netlink)
            overruns.tell(self._item.cgroup, self._dropped)
            # CRIU lets its sockets speak next.
            network_lock.block(self._pid)
        elif script.name == 'pre-resume':
            assert self._pid is not None
            self._owner.ready(self._pid, self._master)
            self._ready = True
        elif script.name == 'post-resume' and self._ready:
            # CRIU says this of one that was refused, too.
            self.resume()
