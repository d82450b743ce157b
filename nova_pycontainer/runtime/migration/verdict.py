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

"""Where an instance is after the commit of its migration.

The destination knows, and is asked until it answers. Whether one that never
will again had let it run nobody can find out here: a human who has switched
that host off, or has looked at it, may say so.
"""

import threading
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import question

LOG = logging.getLogger(__name__)

Phase = protocol.Phase

_RETRY = 2.0


class Verdict:
    """What the destination says of a migration that was committed.

    :param endpoint: the destination
    :param progress: of the migration; its error says what is waited for
    """

    def __init__(
        self, identity: keys.Identity, endpoint: ty.Mapping[str, ty.Any],
        progress: protocol.Progress,
    ) -> None:
        self._identity = identity
        self.endpoint = endpoint
        self._progress = progress
        self._said: Phase | None = None
        self._closed = False
        self._wake = threading.Event()

    def _ask(self) -> Phase:
        return question.ask(
            self._identity, self.endpoint, self._progress.migration,
            self._progress.uuid, Phase.COMMITTED)

    def wait(self) -> bool | None:
        """Wait until it is known.

        :returns: whether it runs there; None: it was closed before
        """
        while not self._closed:
            try:
                phase = self._said or self._ask()
            except Exception as e:
                # Whatever it is: nothing but an answer may end this.
                self._progress.error = errors.ContainerError(
                    'network', 'whether the destination runs the instance is '
                    'not known, so it stays frozen here',
                    uuid=self._progress.uuid, cause=str(e), remedy='Bring '
                    'the agent of the destination back. If it will never '
                    'come back, see "pycontainer migration --help"').to_dict()
            else:
                if phase in (Phase.RUNNING, Phase.COMPLETED):
                    self._progress.error = None
                    return True
                if phase in (Phase.ABORTED, Phase.FAILED):
                    self._progress.error = None
                    return False
                # "Committed" is not there yet, and may still fail.
            self._wake.wait(_RETRY)
        return None

    def say(self, there: bool) -> None:
        """Say it in place of the destination.

        :param there: it runs there, or what there is of it is there
        :raises ContainerError: ``bad_state``: the destination can say it
        """
        try:
            phase = self._ask()
        except (OSError, errors.ContainerError) as e:
            LOG.warning('instance %s: an administrator has said that it is '
                        '%s: %s', self._progress.uuid,
                        'on the destination' if there else 'here', e)
        else:
            raise errors.ContainerError(
                'bad_state', f'the destination answers: the migration is '
                f'{phase} there', uuid=self._progress.uuid,
                remedy='Wait: the agents settle it by themselves')
        self._said = Phase.RUNNING if there else Phase.FAILED
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()
