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

"""A guest is asked to shut down, and killed if it does not."""

import os
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import ends
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import execute
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import state

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime import host

LOG = logging.getLogger(__name__)

#: From its start an init has so long, in seconds, to heed signals.
_HANDLER_TIMEOUT = 10.0


def stop(
    owner: 'host.Host', end: ends.Ends, uuid: str, timeout_s: float
) -> dict[str, ty.Any]:
    """Ask the init to shut down; after the time-out kill it.

    :returns: how it ended; idempotent
    """
    with owner.locked(uuid) as entry:
        item = entry.container
        current = item.status()
        if current == 'suspended':
            owner.checkpoints.discard(item)
        if current in ('defined', 'stopped', 'suspended'):
            end.finish(entry)
            return (item.st.exit or state.Exit()).to_dict()
        if current == 'paused':
            # A frozen init cannot shut down.
            item.hold_network(False)
            item.cgroup.freeze(False)
        entry.stopping += 1
        pidfd = item.open()
        command = None
        deadline = time.monotonic() + timeout_s
        if pidfd is not None and current != 'created' and timeout_s > 0:
            command = _ask(item, pidfd, timeout_s)
    try:
        if command is not None:
            _run(item, command, timeout_s)
        if pidfd is None or current == 'created' or not process.exited(
                pidfd, max(deadline - time.monotonic(), 0)):
            with owner.locked(uuid):
                item.kill()
        with owner.locked(uuid):
            end.finish(entry)
            return (item.st.exit or state.Exit()).to_dict()
    finally:
        entry.stopping -= 1
        if pidfd is not None:
            os.close(pidfd)


def _ask(
    item: container.Container, pidfd: int, timeout_s: float
) -> tuple[str, ...] | None:
    """Ask the init to shut down.

    :param timeout_s: that it has for it
    :returns: a command that has to be run in the guest instead, if its init
        knows no signal for that
    """
    assert item.st.run is not None
    init = item.st.run['init']
    if init['stop_signal'] is not None:
        number = int(init['stop_signal'])
        _wait_for_handler(item, pidfd, number, timeout_s)
        process.send_signal(pidfd, number)
        return None
    return tuple(init['stop_argv'])


def _wait_for_handler(
    item: container.Container, pidfd: int, number: int, timeout_s: float
) -> None:
    """Give an init that was just started the time to heed a signal: sent
    earlier, the kernel drops it, and nobody would shut down.
    """
    assert item.st.run is not None
    pid = int(item.st.run['process']['pid'])
    until = min(float(item.st.run['started_at'] or 0) + _HANDLER_TIMEOUT,
                time.time() + timeout_s)
    while not process.heeds(pid, number) and time.time() < until:
        if process.exited(pidfd, 0.05):
            return


def _run(
    item: container.Container, command: tuple[str, ...], timeout_s: float
) -> None:
    try:
        execute.run(item, [*command], timeout_s=timeout_s)
    except errors.ContainerError as e:
        # The time-out and SIGKILL are still to come.
        LOG.warning('instance %s: asking it to shut down: %s', item.uuid, e)
