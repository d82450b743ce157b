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

"""An agent that is told to end in the middle of a post-copy.

Of every other migration the agent may end at any moment: what was begun is
undone or finished at its next start. In a post-copy the guest runs on one host
while a part of its memory is on the other, and the pages go through both
agents; without either of them it is lost. So these come to their end first.
"""

import collections.abc as cabc
import contextlib
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import protocol

LOG = logging.getLogger(__name__)

#: Seconds between two looks.
_LOOK_S = 0.2

#: From here on the other host may let it run.
_GIVEN = (protocol.Phase.READY, protocol.Phase.COMMITTED,
          protocol.Phase.RUNNING)


class Job(ty.Protocol):
    """A migration from or to this host."""

    progress: protocol.Progress

    @property
    def lazy(self) -> bool:
        """Whether pages follow its guest."""

    def abort(self, reason: str) -> None:
        """Give up, if that can be."""


def drain(jobs: cabc.Callable[[], cabc.Iterable[Job]], grace_s: float,
          go_on: cabc.Callable[[], bool]) -> list[str]:
    """Wait for the pages of each post-copy, and begin no other.

    :param jobs: returns the migrations that there are
    :param grace_s: how long to wait for the word of another host, which may
        be gone; pages are waited for as long as they take
    :param go_on: called while it waits; false ends it
    :returns: uuids of those that are in the middle still
    """
    deadline = time.monotonic() + grace_s
    told: set[str] = set()
    while True:
        given = []
        for job in jobs():
            progress = job.progress
            if not job.lazy or progress.phase in protocol.ENDED:
                continue
            if progress.phase in _GIVEN:
                given.append(progress)
            else:
                # Or it would be given away just before we end.
                with contextlib.suppress(errors.ContainerError):
                    job.abort('the agent is told to end')
        if not given:
            return []
        for progress in given:
            if progress.uuid not in told:
                told.add(progress.uuid)
                LOG.info('instance %s: waiting for the end of its post-copy; '
                         'it would be lost', progress.uuid)
        running = any(progress.phase == protocol.Phase.RUNNING
                      for progress in given)
        if not go_on() or not running and time.monotonic() > deadline:
            return [progress.uuid for progress in given]
        time.sleep(_LOOK_S)
