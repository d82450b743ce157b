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

"""Post-copy: CRIU's lazy-pages daemon on the destination.

The guest runs while most of its memory is still at the source. A page that it
touches is asked for; the others follow by themselves.
"""

import collections.abc as cabc
import contextlib
import os
import pathlib
import socket
import threading
import time

from oslo_log import log as logging

from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import process

LOG = logging.getLogger(__name__)

_PAGES_FD = 10
_START_TIMEOUT = 10.0
_SETTINGS = {
    # What restores the guest is in its user namespace, and needs faults of
    # the kernel handled too.
    pathlib.Path('/proc/sys/vm/unprivileged_userfaultfd'): 1,
    # One pipe carries as many pages as CRIU asks for at a time.
    pathlib.Path('/proc/sys/fs/pipe-max-size'): 4 << 20,
}

_lock = threading.Lock()
_users = 0
_before: dict[pathlib.Path, str] = {}


@contextlib.contextmanager
def userfaultfd() -> cabc.Iterator[None]:
    """Let processes of a user namespace make userfaultfds meanwhile.

    The settings are the host's, so they are raised for the moments of a
    restore only and then put back. A guest gets nothing from them: its
    seccomp profile refuses the call.
    """
    global _users
    with _lock:
        if _users == 0:
            for path, wanted in _SETTINGS.items():
                text = path.read_text().strip()
                if int(text) < wanted:
                    _before[path] = text
                    path.write_text(str(wanted))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for path, text in _before.items():
                    path.write_text(text)
                _before.clear()


class Daemon:
    """``criu lazy-pages``, a child of the keeper: it outlives the agent.

    :param images: directory of the images; its socket lies there too
    :param pages: leads to the source's page server; the caller closes it
    """

    def __init__(
        self, tool: criu.Criu, images: pathlib.Path, pages: socket.socket
    ) -> None:
        self._log = images / 'lazy-pages.log'
        self._pid = tool.spawn(
            ['lazy-pages', '--images-dir', str(images), '--work-dir',
             str(images), '--page-server', '--ps-socket', str(_PAGES_FD),
             '--log-file', self._log.name, '-v2'],
            {_PAGES_FD: pages.fileno()})
        self._pidfd = os.pidfd_open(self._pid)
        deadline = time.monotonic() + _START_TIMEOUT
        while not (images / 'lazy-pages.socket').exists():
            if process.exited(self._pidfd) or time.monotonic() > deadline:
                self.close()
                raise errors.ContainerError(
                    'criu_failed', 'the daemon for pages does not start',
                    cause=criu.reason(self._log))
            time.sleep(0.002)

    def wait(self, timeout: float) -> None:
        """Wait until the last page has come.

        :raises ContainerError: ``lost``
        """
        if not process.exited(self._pidfd, timeout):
            raise errors.ContainerError(
                'lost', 'the pages of the guest did not come in time')
        cause = criu.reason(self._log)
        if cause is not None:
            raise errors.ContainerError(
                'lost', 'pages of the guest are lost', cause=cause)

    def close(self) -> None:
        """Idempotent."""
        if self._pidfd >= 0:
            process.send_signal(self._pidfd, 9)
            os.close(self._pidfd)
            self._pidfd = -1
