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

"""Who ends a guest that is being restored, if nobody else can.

A container can be frozen only when CRIU has stopped all of its processes for
the last time, which it tells in ``pre-resume``. It lets go of them then
whether or not anybody answers (``restore_root_task`` of its cr-restore.c), and
the kernel does when CRIU itself dies. If the agent or CRIU dies shortly
before, the guest would run without the right to.
"""

import contextlib
import os

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import process

#: Its standard input ends with the process that is watched. What it says is
#: for the agent, which may be gone.
_SCRIPT = '''
trap '' PIPE
read -r line
echo ended
echo 1 >"$0/cgroup.freeze"
echo 1 >"$0/cgroup.kill"
'''
#: CRIU's end, there.
_FD = 11
_END_TIMEOUT = 10.0


class Guardian:
    """Children of the keeper, which outlives the agent: one for each death.

    :ivar fds: for CRIU
    :param group: of the guest
    """

    def __init__(self, tool: criu.Criu, group: cgroup.Cgroup) -> None:
        self._group = group
        self._pidfds: list[int] = []
        self.fds: dict[int, int] = {}
        self._ours: list[int] = []
        said, say = os.pipe2(os.O_CLOEXEC)
        self._said = said
        try:
            self._ours.append(self._watch(tool, say))
            self.fds[_FD] = self._watch(tool, say)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(say)

    def _watch(self, tool: criu.Criu, say: int) -> int:
        """:returns: what ends with whom has it"""
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        try:
            pid = tool.run(['sh', '-c', _SCRIPT, str(self._group.v2)],
                           {0: theirs, 1: say})
            self._pidfds.append(process.pidfd_open(pid))
            # It races with what the kernel lets go at the same moment.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(
                    pid, os.SCHED_FIFO, os.sched_param(1))
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        return ours

    def given(self) -> None:
        """CRIU has its end, and nobody else may."""
        os.close(self.fds.pop(_FD))

    def freeze(self) -> None:
        """From here no death can let the guest run: it needs no guardian.

        :raises ContainerError: ``criu_failed``: CRIU has died, and the guest
            is dead
        """
        (self._group.v2 / 'cgroup.freeze').write_text('1')
        self._end()
        if os.read(self._said, 1):
            raise errors.ContainerError('criu_failed', 'criu has ended')

    def _end(self) -> None:
        while self._pidfds:
            pidfd = self._pidfds.pop()
            process.send_signal(pidfd, 9)
            process.exited(pidfd, _END_TIMEOUT)
            os.close(pidfd)

    def close(self) -> None:
        """Idempotent."""
        self._end()
        for fd in (*self._ours, *self.fds.values(), self._said):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._ours, self.fds, self._said = [], {}, -1
