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


"""A connection to the agent, and what is said when there is none."""

import collections.abc as cabc
import contextlib
import http.client
import socket
import threading
import time
import typing as ty

from nova_pycontainer.runtime import errors

#: Seconds for the agent to take a connection.
_CONNECT_TIMEOUT: ty.Final = 10.0
#: Seconds between two tries.
_RETRY: ty.Final = 0.2


class Patience:
    """For an agent that has just gone away: it may be restarted.

    Whoever has a request waits, all from the same moment on. An agent that is
    away for longer is given up at once, until it is there again.

    :param seconds: that are waited; 0: not at all
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._since: float | None = None

    def again(self) -> bool:
        """Whether to try once more; called when it was not there."""
        with self._lock:
            now = time.monotonic()
            if self._since is None:
                self._since = now
            return now - self._since < self._seconds

    def reached(self) -> None:
        with self._lock:
            self._since = None


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket.

    :param timeout: seconds of silence until the agent is given up
    """

    def __init__(
        self, path: str, timeout: float, patience: Patience | None = None
    ) -> None:
        super().__init__('localhost', timeout=timeout)
        self._path = path
        self._patience = patience or Patience(0)

    def connect(self) -> None:
        """:raises errors.AgentUnavailable: nobody is there"""
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(_CONNECT_TIMEOUT)
            try:
                sock.connect(self._path)
            except OSError as e:
                sock.close()
                # Nothing was asked for yet, so that it may be tried again.
                if isinstance(e, (FileNotFoundError, ConnectionRefusedError)
                              ) and self._patience.again():
                    time.sleep(_RETRY)
                    continue
                raise _unreachable(self._path, e) from e
            self._patience.reached()
            sock.settimeout(self.timeout)
            self.sock = sock
            return


def _unreachable(path: str, error: OSError) -> errors.AgentUnavailable:
    remedy = 'Is pycontainer-agent running on this host? See its log'
    if isinstance(error, PermissionError):
        remedy = ('Let this user be a member of the group of the socket '
                  '([pycontainer]agent_group)')
    return errors.AgentUnavailable(
        'agent_unavailable', f'cannot connect to the agent at {path}',
        cause=error.strerror or str(error), remedy=remedy)


@contextlib.contextmanager
def answering(connection: Connection, verb: str) -> cabc.Iterator[None]:
    """:raises errors.AgentUnavailable: what is done in it has failed"""
    try:
        yield
    except TimeoutError as e:
        raise errors.AgentUnavailable(
            'agent_unavailable', f'the agent did not answer {verb!r}',
            cause=f'nothing came for {connection.timeout:g} s',
            remedy='See the log of pycontainer-agent on that host') from e
    except (OSError, http.client.HTTPException) as e:
        raise lost(verb, e) from e


def lost(what: str, error: Exception) -> errors.AgentUnavailable:
    """What is raised when it has gone away during something."""
    return errors.AgentUnavailable(
        'agent_unavailable', f'the agent went away during {what!r}',
        cause=str(error) or type(error).__name__,
        remedy='What it had begun, it undoes or finishes when it is back')
