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

"""The keeper: holds what a restart of the agent must not lose.

One small root process per host. It is the parent (child subreaper) of every
container's init, so it learns the exit statuses; it holds the pty masters,
so consoles go on; and it does nothing else, so it need never be restarted.
Single threaded: one loop, in which nothing blocks.

Protocol: a SEQPACKET unix socket, mode 0600, root only. One packet is one
JSON object, with descriptors beside it (SCM_RIGHTS)::

    {"v": 1, "id": n, "verb": "run", "params": {...}}
    {"id": n, "result": {...}}
    {"id": n, "error": {"code", "message", "step", "cause"}}
    {"event": "exit", "uuid", "pid", "code", "signal", "at"}

the last to those who subscribed. Who sends anything else is told so and
disconnected. The keeper's modules use the standard library only, and of it
little: their memory is the price of every host.
"""

import argparse
import collections
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import typing as ty

from nova_pycontainer.runtime import keeper_children
from nova_pycontainer.runtime import keeper_consoles
from nova_pycontainer.runtime import keeper_loop
from nova_pycontainer.runtime import keeper_memory
from nova_pycontainer.runtime import keeper_params
from nova_pycontainer.runtime import keeper_process

VERSION: ty.Final = 1
#: Largest packet, either way. Two tails of control characters, each of which
#: JSON writes with six bytes, fit; so does the kernel's default send buffer.
MAX_PACKET: ty.Final = 131072
MAX_FDS: ty.Final = 32
MAX_PEERS: ty.Final = 256
#: Packets that wait for a peer that does not read; then it is disconnected.
MAX_QUEUE: ty.Final = 1024
#: Entries in one answer of "list".
PAGE: ty.Final = 100

_PR_SET_CHILD_SUBREAPER: ty.Final = 36
_CREDENTIALS: ty.Final = struct.Struct('3i')

Params = dict[str, ty.Any]


class Peer:
    """One connection, with what it has not read yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.queue: collections.deque[bytes] = collections.deque()
        self.subscribed = False
        #: Disconnect once it has its last answer.
        self.closing = False


class Keeper:
    """The server: packets in, answers and events out."""

    def __init__(
        self, listener: socket.socket, memory: keeper_memory.Memory
    ) -> None:
        self._listener = listener
        self._memory = memory
        self._peers: set[Peer] = set()
        self._loop = keeper_loop.Loop()
        self._children = keeper_children.Children(
            self._loop, log, self._publish, memory)
        self._consoles = keeper_consoles.Consoles(self._loop, log, memory)

    def restore(self) -> None:
        """Take up what a former keeper has left."""
        watches, consoles = self._memory.load()
        for watch in watches:
            self._children.restore(watch)
        for uuid, (kept, fd) in consoles.items():
            try:
                self._consoles.take(uuid, kept, [fd])
            except OSError as e:
                log(f'console of {uuid}: {e}')
                os.close(fd)

    def serve(self) -> None:
        """Run until SIGTERM. Children and their files are left as they are."""
        self._loop.watch(self._listener.fileno(), keeper_loop.READ,
                         self._on_connect)
        self._loop.run(self._children.reap)

    # Peers

    def _on_connect(self, _: int) -> None:
        try:
            sock, _address = self._listener.accept()
        except OSError as e:
            log(f'accept: {e}')
            return
        _pid, uid, _gid = _CREDENTIALS.unpack(sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid not in (0, os.geteuid()) or len(self._peers) >= MAX_PEERS:
            log(f'refused a connection of uid {uid}')
            sock.close()
            return
        sock.setblocking(False)
        peer = Peer(sock)
        self._peers.add(peer)
        self._want(peer)

    def _want(self, peer: Peer) -> None:
        events = keeper_loop.WRITE if peer.queue else 0
        if not peer.closing:
            events |= keeper_loop.READ
        self._loop.watch(peer.sock.fileno(), events,
                         lambda mask: self._on_peer(peer, mask))

    def _disconnect(self, peer: Peer) -> None:
        if peer in self._peers:
            self._peers.discard(peer)
            self._loop.forget(peer.sock.fileno())
            peer.sock.close()

    def _send(self, peer: Peer, message: Params) -> None:
        if peer not in self._peers:
            return
        packet = json.dumps(message).encode()
        if len(packet) > MAX_PACKET:
            packet = json.dumps({'id': message.get('id'), 'error': {
                'code': 'internal', 'message': 'the answer is too large',
            }}).encode()
        peer.queue.append(packet)
        if len(peer.queue) > MAX_QUEUE:
            log('disconnected a peer that does not read')
            self._disconnect(peer)
        else:
            self._flush(peer)

    def _flush(self, peer: Peer) -> None:
        try:
            while peer.queue:
                peer.sock.send(peer.queue[0], socket.MSG_NOSIGNAL)
                peer.queue.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._disconnect(peer)
            return
        if peer.closing and not peer.queue:
            self._disconnect(peer)
        else:
            self._want(peer)

    def _publish(self, event: Params) -> None:
        for peer in [p for p in self._peers if p.subscribed]:
            self._send(peer, event)

    def _on_peer(self, peer: Peer, mask: int) -> None:
        if mask & keeper_loop.WRITE:
            self._flush(peer)
        if mask & keeper_loop.READ and peer in self._peers:
            self._on_packet(peer)

    def _on_packet(self, peer: Peer) -> None:
        try:
            data, ancillary, flags, _address = peer.sock.recvmsg(
                MAX_PACKET + 1, socket.CMSG_SPACE(MAX_FDS * 4),
                socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self._disconnect(peer)
            return
        fds: list[int] = []
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                count = len(raw) // 4
                fds += struct.unpack(f'{count}i', raw[:count * 4])
        try:
            if data:
                self._on_request(peer, data, flags, fds)
            else:
                self._disconnect(peer)
        finally:
            # Whoever keeps one has taken it out of the list.
            for fd in fds:
                os.close(fd)

    def _on_request(
        self, peer: Peer, data: bytes, flags: int, fds: list[int]
    ) -> None:
        ident = 0

        def answer(what: Params | keeper_params.Refused) -> None:
            kind, body = (
                ('error', what.as_dict())
                if isinstance(what, keeper_params.Refused)
                else ('result', what))
            self._send(peer, {'id': ident, kind: body})

        try:
            if flags & socket.MSG_TRUNC or len(data) > MAX_PACKET:
                raise keeper_params.Malformed('the packet is too large')
            if flags & socket.MSG_CTRUNC:
                raise keeper_params.Malformed('too many descriptors')
            ident, verb, params = keeper_params.request(data, VERSION)
            keeper_params.check(verb, params, len(fds))
            self._do(peer, verb, params, fds, answer)
        except keeper_params.Malformed as e:
            peer.closing = True
            answer(e)
        except keeper_params.Refused as e:
            answer(e)
        except OSError as e:
            answer(keeper_params.Refused(
                keeper_process.code_of(e.errno or 0),
                'the keeper failed', cause=str(e)))

    def _do(
        self, peer: Peer, verb: str, params: Params, fds: list[int],
        answer: keeper_children.Answer,
    ) -> None:
        match verb:
            case 'ping':
                answer({'version': VERSION, 'pid': os.getpid(),
                        'features': keeper_params.features()})
            case 'run':
                self._children.run(params, fds, answer)
            case 'spawn':
                self._children.spawn(params, fds, answer)
            case 'watch':
                answer(self._children.watch(params))
            case 'hold':
                answer(self._consoles.hold(params, fds))
            case 'attach':
                answer(self._consoles.attach(params, fds))
            case 'resize':
                answer(self._consoles.resize(params))
            case 'release':
                answer(self._consoles.release(params))
            case 'list':
                answer(self._list(params.get('after') or ''))
            case 'subscribe':
                peer.subscribed = True
                answer({})
            case _:
                raise AssertionError(f'verb {verb} has no implementation')

    def _list(self, after: str) -> Params:
        watched = self._children.watched()
        consoles = self._consoles.describe()
        uuids = sorted(u for u in {*watched, *consoles} if u > after)
        return {
            'entries': [{
                'uuid': uuid,
                'pids': watched.get(uuid, []),
                'console': consoles.get(uuid),
            } for uuid in uuids[:PAGE]],
            'more': len(uuids) > PAGE,
        }


def log(text: str) -> None:
    """To stderr: the journal, or the file that the agent gave."""
    print(f'keeper: {text}', file=sys.stderr, flush=True)


@contextlib.contextmanager
def bound(path: str) -> ty.Iterator[socket.socket]:
    """A listener on ``path``, which belongs to this process until the end.

    :raises BlockingIOError: another keeper serves it
    """
    lock = os.open(f'{path}.lock', os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                   0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            # Of a keeper that was killed: we have the lock.
            os.unlink(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            umask = os.umask(0o177)
            try:
                sock.bind(path)
            finally:
                os.umask(umask)
            sock.listen(64)
            sock.setblocking(False)
            yield sock
        os.unlink(path)
    finally:
        os.close(lock)


def become_subreaper() -> None:
    """Orphans among our descendants become our children (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), 'prctl')


def detach() -> int:
    """Leave the caller's session and process group; the caller waits.

    :returns: in the child, a pipe to write to once the keeper serves
    """
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(ready_w)
        # End of file without a word: the child has failed.
        os._exit(0 if os.read(ready_r, 1) else 1)
    os.close(ready_r)
    os.setsid()
    return ready_w


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='pycontainer-keeper', description='Holds consoles and exit '
        'statuses of containers while the agent is restarted.')
    parser.add_argument('--socket', required=True, help='socket to serve')
    parser.add_argument('--detach', action='store_true',
                        help='go to the background once it is served')
    args = parser.parse_args(argv)
    path = os.path.abspath(args.socket)
    notifier = keeper_memory.Notifier()
    ready = detach() if args.detach else None
    os.chdir('/')
    # Never die of a viewer, or of a full disk under a limit.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with bound(path) as listener:
            become_subreaper()
            keeper = Keeper(listener, keeper_memory.Memory(
                f'{path}.d', notifier, log))
            keeper.restore()
            notifier.send('READY=1')
            if ready is not None:
                os.write(ready, b'1')
                os.close(ready)
            keeper.serve()
    except BlockingIOError:
        log(f'another keeper serves {path}')
        return 1
    except OSError as e:
        log(str(e))
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
