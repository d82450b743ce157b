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

"""A container, and what its agent knows of it."""

import threading
import typing as ty

from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime import volume_swap


class _Migration(ty.Protocol):
    progress: protocol.Progress
    committed: bool

    def abort(self, reason: str) -> None: ...


class Entry:
    """A container and what is known of it in this process only."""

    def __init__(self, item: container.Container) -> None:
        self.container = item
        self.lock = threading.RLock()
        #: Set while a caller wants the container down: then an exit that
        #: looks like a reboot is none.
        self.stopping = 0
        #: The guest has asked for a reboot and is not up again.
        self.rebooting = False
        self.deleted = False
        #: The migration that it takes part in, on either side.
        self.migration: _Migration | None = None
        #: The volume that is put in the place of another.
        self.swap: volume_swap.Swap | None = None

    def check_stays(self) -> None:
        """:raises ContainerError: ``bad_state``: it is being migrated, or a
            volume of it replaced
        """
        if self.migration is not None:
            raise errors.ContainerError(
                'bad_state', 'the instance is being migrated',
                uuid=self.container.uuid,
                remedy='Wait for the end of its migration')
        if self.swap is not None:
            raise errors.ContainerError(
                'bad_state', f'volume {self.swap.old.id} of the instance is '
                'being replaced', uuid=self.container.uuid,
                remedy='Wait for the end of it')

    def check_changeable(self) -> None:
        """Whether it can have other devices now.

        :raises ContainerError: ``bad_state``
        """
        self.check_stays()
        if self.container.status() == 'suspended':
            raise errors.ContainerError(
                'bad_state', 'the instance is suspended, and its memory '
                'knows the devices that it had',
                uuid=self.container.uuid, remedy='Resume it first')

    def check_settled(self) -> None:
        """:raises ContainerError: ``bad_state``: which host has it is not
            known
        """
        if self.migration is not None and self.migration.progress.phase in (
                protocol.Phase.READY, protocol.Phase.COMMITTED):
            raise errors.ContainerError(
                'bad_state', 'its migration is not settled: '
                'where it may run is not known yet',
                uuid=self.container.uuid,
                remedy='Bring the agents of both hosts back')

    def require(self, *states: str) -> str:
        """:returns: its state
        :raises ContainerError: ``bad_state``: it is in no other one
        """
        current = self.container.status()
        if current not in states:
            raise errors.ContainerError(
                'bad_state',
                f'the container is {current}, not {" or ".join(states)}',
                uuid=self.container.uuid)
        return current
