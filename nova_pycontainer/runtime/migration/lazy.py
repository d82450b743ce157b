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
import json
import os
import pathlib
import signal
import socket
import threading
import time

from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import process

LOG = logging.getLogger(__name__)

#: For all pages to come, in seconds: of an instance of any size. That no more
#: of them come is noticed earlier, by those who carry them (``idle_s`` of
#: :class:`.relay.Relay`).
LONGEST = 7 * 86400.0
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


#: What is to be put back, for an agent that finds it when it starts.
_KEPT = 'settings.json'

#: The daemon's guardian. Whoever else has died: a guest without its pages
#: would read zeros where its memory was, so it must not go on.
_GUARD = '''
cgroup=$0; result=$1; shift
"$@"
code=$?
[ "$code" = 0 ] || echo 1 >"$cgroup/cgroup.kill"
echo "$code" >"$result"
'''


@contextlib.contextmanager
def userfaultfd(directory: pathlib.Path) -> cabc.Iterator[None]:
    """Let processes of a user namespace make userfaultfds meanwhile.

    The settings are the host's, so they are raised for the moments of a
    restore only and then put back. A guest gets nothing from them: its
    seccomp profile refuses the call.

    :param directory: where it is noted what has to be put back
    """
    global _users
    with _lock:
        if _users == 0:
            for path in _SETTINGS:
                text = path.read_text().strip()
                if int(text) < _SETTINGS[path]:
                    _before[path] = text
            (directory / _KEPT).write_text(json.dumps(
                {str(path): text for path, text in _before.items()}))
            for path in _before:
                path.write_text(str(_SETTINGS[path]))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _before.clear()
                put_back(directory)


def put_back(directory: pathlib.Path) -> None:
    """Put the host's settings back; also those that a killed agent left."""
    kept = directory / _KEPT
    try:
        before = json.loads(kept.read_text())
    except (FileNotFoundError, ValueError):
        return
    for path in _SETTINGS:
        if str(path) in before:
            path.write_text(before[str(path)])
    kept.unlink()


def _result(images: pathlib.Path) -> pathlib.Path:
    return images.with_name(f'{images.name}.pages')


def complete(images: pathlib.Path, timeout: float = _START_TIMEOUT) -> bool:
    """Whether all pages have come, when nobody has waited for that.

    The daemon ends soon: its connection was one of the agent that has ended.

    :param images: directory of the images; it may be gone
    """
    file = _result(images)
    deadline = time.monotonic() + timeout
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return _code(file) == 0


def forget(images: pathlib.Path) -> None:
    _result(images).unlink(missing_ok=True)


def _code(file: pathlib.Path) -> int | None:
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return None


class Daemon:
    """``criu lazy-pages``, a child of the keeper: it outlives the agent.

    :param images: directory of the images; its socket lies there too
    :param pages: leads to the source's page server; the caller closes it
    :param group: of the guest, which ends if the daemon fails
    """

    def __init__(
        self, tool: criu.Criu, images: pathlib.Path, pages: socket.socket,
        group: cgroup.Cgroup,
    ) -> None:
        self._log = images / 'lazy-pages.log'
        self._result = _result(images)
        self._result.unlink(missing_ok=True)
        self._pid = tool.spawn(
            ['lazy-pages', '--images-dir', str(images), '--work-dir',
             str(images), '--page-server', '--ps-socket', str(_PAGES_FD),
             '--log-file', self._log.name, '-v2'],
            {_PAGES_FD: pages.fileno()},
            ['sh', '-c', _GUARD, str(group.v2), str(self._result)])
        self._pidfd = os.pidfd_open(self._pid)
        deadline = time.monotonic() + _START_TIMEOUT
        while not (images / 'lazy-pages.socket').exists():
            if process.exited(self._pidfd) or time.monotonic() > deadline:
                self.close()
                raise errors.ContainerError(
                    'criu_failed', 'the daemon for pages does not start',
                    cause=criu.reason(self._log))
            time.sleep(0.002)

    def fileno(self) -> int:
        """Readable when it has ended."""
        return self._pidfd

    def failed(self) -> bool:
        """Whether it has ended before the last page had come."""
        return process.exited(self._pidfd) and _code(self._result) != 0

    def wait(self, timeout: float) -> None:
        """Wait until the last page has come.

        :raises ContainerError: ``lost``
        """
        if not process.exited(self._pidfd, timeout):
            raise errors.ContainerError(
                'lost', 'the pages of the guest did not come in time')
        code = _code(self._result)
        cause = criu.reason(self._log)
        if code == 0:
            # All have come. What went wrong then is the farewell to a source
            # that was gone first (disconnect_from_page_server of CRIU's
            # page-xfer.c).
            if cause is not None:
                LOG.info('the daemon for pages, at its end: %s', cause)
            return
        raise errors.ContainerError(
            'lost', 'pages of the guest are lost', cause=cause or (
                f'the daemon for pages ended with {code}'))

    def close(self) -> None:
        """Idempotent."""
        if self._pidfd >= 0:
            # The guardian's session is the daemon's, too.
            if not process.exited(self._pidfd):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._pid, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
            self._result.unlink(missing_ok=True)
