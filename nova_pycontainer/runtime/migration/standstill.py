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

"""The guest stands still while CRIU marks its pages, and sleeps on.

CRIU runs code of its own in the main thread of every process, in each round
of :mod:`.precopy` as in a dump. A sleep of one of those ends with EINTR then,
see :mod:`.registers`, and would be seen to: CRIU lets the processes run before
it says anything. So the guest is frozen before, and CRIU told which cgroup
that is. It takes hold of all threads there, thaws it, and freezes it again
before it lets go of the first one (``freezer_restore_state`` in its
seize.c). Then the sleeps are set right, and the guest goes on while CRIU
writes the pages.
"""

import contextlib
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import moment as moment_module
from nova_pycontainer.runtime import pausing
from nova_pycontainer.runtime import process

LOG = logging.getLogger(__name__)

#: Seconds for CRIU to take hold of all threads, which are frozen.
SEIZE_TIMEOUT: ty.Final = 10
#: Seconds to wait for a moment in which the guest can be frozen.
_PATIENCE = 2.0
#: Seconds for CRIU that was killed to end.
_END_TIMEOUT = 10.0
#: Seconds for CRIU from its first thread to its last.
_DETACH_TIMEOUT = 2.0
_POLL = 0.001


class Standstill:
    """Of one round. At its end CRIU has to have ended, or been killed: it
    would freeze the guest again.

    :param init: pid of the container's init
    """

    def __init__(self, group: cgroup.Cgroup, moment: moment_module.Moment,
                 init: int) -> None:
        self._group = group
        self._moment = moment
        self._init = init
        self._asleep: list[str] = []
        self._began = 0.0
        #: Seconds for which the guest stood still.
        self.lasted = 0.0
        self._ended = threading.Event()
        self._watcher = threading.Thread(
            target=self._watch, name='standstill', daemon=True)

    def __enter__(self) -> 'Standstill':
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._watcher.ident is not None:
            self._watcher.join()
        elif self._began:
            self._thaw()

    def begin(self) -> None:
        """Freeze the guest; CRIU is to be asked next.

        :raises ContainerError: ``criu_failed``: not now
        """
        deadline = time.monotonic() + _PATIENCE
        while not self._freeze():
            if time.monotonic() > deadline:
                raise errors.ContainerError(
                    'criu_failed', 'its processes never stop starting others')
            time.sleep(pausing.EXEC)
        self._asleep = self._moment.in_round(self._init)
        self._watcher.start()

    def _freeze(self) -> bool:
        """:returns: whether CRIU can take hold of everything"""
        # It would try for as long as it may, and the guest stands still.
        if any(map(process.traced, self._group.threads())):
            raise errors.ContainerError(
                'criu_failed', 'one of its processes is traced')
        self._moment.before_round()
        self._began = time.monotonic()
        try:
            self._group.freeze(True, _PATIENCE)
        except errors.ContainerError as e:
            raise errors.ContainerError(
                'criu_failed', 'it cannot be frozen', cause=str(e)) from e
        if not pausing.in_vfork(self._group):
            return True
        self._thaw()
        return False

    def _watch(self) -> None:
        """Wait until CRIU has held the guest and let go of it."""
        try:
            self._wait()
            # The init goes first.
            deadline = time.monotonic() + _DETACH_TIMEOUT
            for thread in self._asleep:
                while process.traced(thread) and (
                        time.monotonic() < deadline):
                    time.sleep(_POLL)
            self._moment.go_on(self._init)
        except OSError as e:
            LOG.info('process %d: its sleeps: %s', self._init, e)
        except Exception:
            LOG.exception('process %d: its sleeps', self._init)
        finally:
            self._thaw()

    def _wait(self) -> None:
        held = False
        deadline = None
        while True:
            # In this order: nobody takes hold of it after the end.
            ended = self._ended.is_set()
            if process.traced(f'/proc/{self._init}'):
                held = True
            elif held or ended:
                return
            if ended:
                deadline = deadline or time.monotonic() + _END_TIMEOUT
                if time.monotonic() > deadline:
                    LOG.error('process %d: criu does not let go of it',
                              self._init)
                    return
            time.sleep(_POLL)

    def _thaw(self) -> None:
        # Its processes may have ended, and their cgroup with them.
        with contextlib.suppress(OSError):
            (self._group.v2 / 'cgroup.freeze').write_text('0')
        self.lasted = time.monotonic() - self._began
