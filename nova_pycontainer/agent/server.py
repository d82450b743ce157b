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

"""The agent's server: who may ask, and how many at a time.

Connections and running verbs are bounded, every read has a time-out, and
nothing that a client does or leaves undone keeps the others waiting.
"""

import collections.abc as cabc
import contextlib
import errno
import fcntl
import grp
import http
import os
import pwd
import socket
import socketserver
import struct
import threading
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.agent import handler
from nova_pycontainer.agent import protocol
from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: Connections at a time. Most are long polls; consoles are not among them.
MAX_CONNECTIONS: ty.Final = 256
#: Verbs that run at a time, with those that nobody waits for any more.
MAX_RUNNING: ty.Final = 64

_CREDENTIALS: ty.Final = struct.Struct('3i')
# asm-generic/socket.h; not in the socket module.
_SO_PEERGROUPS: ty.Final = 59


class AgentServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves a host's verbs on a unix socket.

    :param path: the socket
    :param host: :class:`nova_pycontainer.runtime.host.Host`, started
    :param group: name of the group whose members may connect; None: root
        alone
    :raises ContainerError: ``exists``: another agent serves it; ``invalid``:
        there is no such group; ``internal``: it cannot be made
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, path: str, host: ty.Any, group: str | None = None, *,
        max_connections: int = MAX_CONNECTIONS,
        max_running: int = MAX_RUNNING,
    ) -> None:
        self.host = host
        self._gid = _gid(group)
        self._connections = threading.BoundedSemaphore(max_connections)
        self._running = threading.BoundedSemaphore(max_running)
        self._active = 0
        self._idle = threading.Condition()
        #: Long polls are to end.
        self.closing = False
        self._path = path
        self._lock = exclusive(path, 'agent')
        try:
            super().__init__(path, handler.Handler)
        except OSError as e:
            os.close(self._lock)
            raise errors.ContainerError(
                'internal', f'cannot serve {path}', cause=str(e)) from e

    def server_bind(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            # Of an agent that was killed: we have the lock.
            os.unlink(self._path)
        umask = os.umask(0o177)
        try:
            super().server_bind()
        finally:
            os.umask(umask)
        if self._gid is not None:
            os.chown(self._path, -1, self._gid)
            os.chmod(self._path, 0o660)

    # Who

    def verify_request(self, request: ty.Any, client_address: ty.Any) -> bool:
        """Refuse other users, even if the socket's mode lets them in."""
        pid, uid, gid = _CREDENTIALS.unpack(request.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid in (0, os.geteuid()):
            return True
        if self._gid is not None and self._gid in (
                gid, *_peer_groups(request, uid, gid)):
            return True
        LOG.warning('Refused user %d (process %d)', uid, pid)
        self._reject(request, errors.ContainerError(
            'forbidden', f'user {uid} may not use the agent',
            remedy='Let it be a member of the group of the agent\'s socket '
                   '([pycontainer]agent_group)'))
        return False

    def _reject(self, request: socket.socket,
                error: errors.ContainerError) -> None:
        """Answer without a thread, and without waiting."""
        status, body = handler.answer(error)
        head = (
            f'HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n'
            f'{protocol.VERSION_HEADER}: {protocol.VERSION}\r\n'
            'Content-Type: application/json\r\n'
            f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n')
        with contextlib.suppress(OSError):
            request.send(head.encode() + body,
                         socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    # How many

    def process_request(
        self, request: ty.Any, client_address: ty.Any
    ) -> None:
        if not self._connections.acquire(blocking=False):
            LOG.warning('Refused a connection: too many are open')
            self._reject(request, errors.ContainerError(
                'agent_unavailable', 'the agent has too many connections',
                remedy='Try again'))
            self.shutdown_request(request)
            return
        with self._idle:
            self._active += 1
        try:
            super().process_request(request, client_address)
        except BaseException:
            # No thread could be started.
            self._done()
            raise

    def process_request_thread(
        self, request: ty.Any, client_address: ty.Any
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._done()

    def _done(self) -> None:
        with self._idle:
            self._active -= 1
            self._idle.notify_all()
        self._connections.release()

    def handle_error(self, request: ty.Any, client_address: ty.Any) -> None:
        # socketserver calls this within its except clause.
        LOG.exception('A request failed')  # noqa: LOG004

    def run(self, call: cabc.Callable[[], object], limit_s: float) -> object:
        """Do something in a thread of its own, and wait for it.

        A thread cannot be stopped from outside: one that is late keeps its
        place among the running ones until it ends.

        :raises handler.Late: after ``limit_s`` seconds
        """
        deadline = time.monotonic() + limit_s
        if not self._running.acquire(timeout=min(
                limit_s, threading.TIMEOUT_MAX)):
            raise handler.Late
        result: list[object] = []
        failure: list[BaseException] = []
        late = threading.Event()

        def work() -> None:
            try:
                result.append(call())
            except BaseException as e:
                failure.append(e)
                if late.is_set():
                    LOG.exception('A verb that nobody waits for has failed')
            finally:
                self._running.release()

        thread = threading.Thread(target=work, name='verb', daemon=True)
        try:
            thread.start()
        except BaseException:
            self._running.release()
            raise
        thread.join(max(deadline - time.monotonic(), 0))
        if thread.is_alive():
            late.set()
            raise handler.Late
        if failure:
            raise failure[0]
        return result[0]

    # The end

    def stop(self, grace_s: float) -> bool:
        """Serve no more, and let those that are served end; idempotent.

        To be called from another thread than ``serve_forever``'s, and
        before the host is closed.

        :returns: whether all have ended within ``grace_s`` seconds
        """
        with self._idle:
            first, self.closing = not self.closing, True
        if first:
            self.shutdown()
            self.server_close()
            # Nobody shall wait at a socket that nobody will serve.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        with self._idle:
            ended = self._idle.wait_for(
                lambda: not self._active, grace_s)
        if first:
            os.close(self._lock)
        return ended


def _gid(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as e:
        raise errors.ContainerError(
            'invalid', f'there is no group {group!r}',
            remedy='Set [pycontainer]agent_group to the group of '
                   'nova-compute\'s user') from e


def _peer_groups(
    sock: socket.socket, uid: int, gid: int
) -> cabc.Sequence[int]:
    """Supplementary groups of the process that has connected."""
    try:
        # The most that Python allows.
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        return struct.unpack(f'{len(raw) // 4}I', raw)
    except OSError as e:
        if e.errno != errno.ERANGE:
            raise
    # More than 256: those that its user has, then.
    try:
        return os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        return []


def exclusive(path: str, what: str) -> int:
    """A lock that ends with this process, however it ends.

    :param path: what is locked; the lock is a file of that name + ``.lock``
    :param what: who has it, for the message
    :returns: a descriptor, to be closed for the lock to end
    :raises ContainerError: ``exists``
    """
    try:
        fd = os.open(f'{path}.lock', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                     0o600)
    except OSError as e:
        raise errors.ContainerError(
            'internal', f'cannot lock {path}', cause=str(e)) from e
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise errors.ContainerError(
            'exists', f'another {what} serves {path}') from e
    return fd
