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

"""Dumping a container, wherever its images go: to another host, or to a
checkpoint on disk.
"""

import pathlib
import threading
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import gone_addresses
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import neighbours
from nova_pycontainer.runtime import network

LOG = logging.getLogger(__name__)

#: What a guest does at one moment and not at the next: then the guest goes
#: on, and the dump is tried again.
_TRANSIENT = (
    'The socket has data to read', "Can't dump that handle",
    'Can\'t lookup mount', 'No such process', 'in-flight', 'inflight',
    'pid: unable to find', 'Unable to seize', 'Task is still busy',
    'error parsing [inotify', 'ctty inheritance',
    'Control messages in queue',
)
_TRIES = 8
_PAUSE = 0.5


def options(
    tool: criu.Criu, item: container.Container, images: pathlib.Path,
    external: dict[str, str], pid: int, *, track: bool = False,
    parent: str | None = None, freezer: pathlib.Path | None = None,
    timeout: int = 300,
) -> ty.Any:
    """The ``criu_opts`` of the dump of an init and all below it.

    :param track: another dump follows, or this one follows another
    :param parent: the images that this one leads to, as seen from ``images``
    :param freezer: a cgroup that is frozen, and is to be so again before
        CRIU lets go of what is in it
    :param timeout: seconds for CRIU to take hold of all processes
    """
    made = tool.options(criu.Options(
        images=images, root=item.root,
        external=guest.dump_externals(external),
        cgroup='/' + item.cgroup.path,
        track_memory=track, parent_images=parent, freeze_cgroup=freezer,
        timeout=timeout))
    made.pid = pid
    return made


def check_network(item: container.Container, pid: int) -> None:
    """What is refused is refused before the freeze.

    :param pid: its init
    :raises ContainerError: ``unsupported``: an interface's name
    """
    network.names_inside(item.spec.nics, pid)


def network_facts(item: container.Container, pid: int) -> dict[str, ty.Any]:
    """What of a container's network CRIU leaves to us; see :mod:`.restoring`.

    A guest that boots changes it until it stands still.

    :param pid: its init
    :raises ContainerError: as :func:`check_network`
    """
    return {'neighbours': neighbours.save(pid),
            'netdevs': network.names_inside(item.spec.nics, pid),
            'addresses': gone_addresses.find(pid)}


def retried(
    uuid: str, dump: ty.Callable[[], None], abort: threading.Event,
    final: ty.Callable[[], bool] = lambda: False,
) -> None:
    """Dump, and again when the guest was in the middle of something that
    passes.

    :param abort: ends the pause between two tries
    :param final: whether an error may not be followed by another try
    """
    for attempt in range(_TRIES):
        try:
            dump()
            return
        except errors.ContainerError as e:
            transient = (
                e.code == 'criu_failed' and e.step == 'dump' and
                any(t in (e.cause or '') for t in _TRANSIENT))
            if final() or not transient or attempt == _TRIES - 1:
                raise
            LOG.info('instance %s: the dump is tried again: %s', uuid,
                     e.cause)
            abort.wait(_PAUSE)
