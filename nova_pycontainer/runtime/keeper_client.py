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

"""How the runtime talks to the keeper; see :mod:`.keeper` for the protocol."""

import contextlib
import fcntl
import json
import os
import pathlib
import resource
import socket
import subprocess
import sys
import threading
import time
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper

LOG = logging.getLogger(__name__)

#: Seconds in which an init system has restarted a keeper that it started.
_RESTART_TIMEOUT: ty.Final = 3.0
#: Of processes, as this one was started with. Later it may have more, which a
#: keeper must not hand on to containers.
_OPEN_FILES: ty.Final = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

#: Seconds for an answer that does not depend on a command.
ANSWER_TIMEOUT: ty.Final = 10.0
#: Seconds beyond a command's own limit: it is killed, then 5 s of grace.
RUN_MARGIN: ty.Final = 15.0

_PACKAGE: ty.Final = pathlib.Path(__file__).resolve().parents[2]
_START: ty.Final = (
    'import sys; sys.path.append(sys.argv.pop(1)); '
    'from nova_pycontainer.runtime import keeper; sys.exit(keeper.main())')


class RunResult(ty.TypedDict):
    """How a command ended; a negative code is a signal."""

    returncode: int
    stdout_tail: str
    stderr_tail: str


class ExitEvent(ty.TypedDict):
    """A watched process has ended; both None where nobody knows how."""

    event: str
    uuid: str
    pid: int
    code: int | None
    signal: int | None
    at: float


class ConsoleEntry(ty.TypedDict):
    log_path: str
    viewers: int
    idle: bool
    lost: int
    dropped: int


class Entry(ty.TypedDict):
    uuid: str
    pids: list[int]
    console: ConsoleEntry | None


def _unavailable(message: str, cause: str) -> errors.ContainerError:
    return errors.ContainerError(
        'keeper_unavailable', message, cause=cause,
        remedy='Is pycontainer-keeper running? See its log')


class _Connection:
    """One connection; not to be shared between threads."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(path)
        except OSError as e:
            self._sock.close()
            raise _unavailable(
                f'cannot connect to the keeper at {path}', str(e)) from e

    def __enter__(self) -> '_Connection':
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None,
        exc: BaseException | None, tb: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def receive(self, timeout_s: float) -> dict[str, ty.Any]:
        """The next message.

        :raises TimeoutError: none came
        :raises ContainerError: ``keeper_unavailable``
        """
        self._sock.settimeout(timeout_s)
        try:
            packet = self._sock.recv(keeper.MAX_PACKET)
        except TimeoutError:
            raise
        except OSError as e:
            raise _unavailable('the keeper is gone', str(e)) from e
        if not packet:
            raise _unavailable(
                'the keeper is gone', 'it closed the connection')
        message = json.loads(packet)
        if not isinstance(message, dict):
            raise _unavailable('the keeper does not answer', 'not an object')
        return message

    def call(
        self, verb: str, params: dict[str, ty.Any], fds: ty.Sequence[int],
        timeout_s: float,
    ) -> dict[str, ty.Any]:
        packet = json.dumps({
            'v': keeper.VERSION, 'id': 1, 'verb': verb, 'params': params,
        }).encode()
        if len(packet) > keeper.MAX_PACKET:
            raise errors.ContainerError(
                'invalid', f'{verb}: the request is larger than '
                f'{keeper.MAX_PACKET} bytes')
        try:
            socket.send_fds(self._sock, [packet], list(fds))
            answer = self.receive(timeout_s)
        except TimeoutError as e:
            raise _unavailable(
                f'the keeper did not answer {verb!r}',
                f'nothing came for {timeout_s:g} s') from e
        except OSError as e:
            raise _unavailable('the keeper is gone', str(e)) from e
        if 'error' in answer:
            raise errors.ContainerError.from_dict(answer['error'])
        result = answer['result']
        assert isinstance(result, dict)
        return result


class Subscription:
    """Exits, as they happen. Iterate, or ask with a time-out.

    :meth:`get` and iteration raise ``keeper_unavailable`` when the keeper
    ends or this side did not read; then subscribe anew and look at the exit
    files, because exits may have been missed.
    """

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def get(self, timeout_s: float) -> ExitEvent | None:
        """The next exit, or None after ``timeout_s`` seconds without one."""
        try:
            return ty.cast(ExitEvent, self._connection.receive(timeout_s))
        except TimeoutError:
            return None

    def __enter__(self) -> 'Subscription':
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None,
        exc: BaseException | None, tb: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()


class KeeperClient:
    """The keeper's verbs. Thread safe: each call has its own connection.

    Every method raises :class:`errors.ContainerError`: with
    ``keeper_unavailable`` when nobody serves the socket, else with what the
    keeper says.
    """

    def __init__(
        self, socket_path: str | os.PathLike[str],
        timeout_s: float = ANSWER_TIMEOUT, *,
        python: str | None = None,
    ) -> None:
        """
        :param python: interpreter that a new keeper is started with where
            the old one has gone; None: whoever calls has to see to it
        """
        self._path = os.fspath(socket_path)
        self._timeout_s = timeout_s
        self._python = python
        self._reviving = threading.Lock()

    def _call(
        self, verb: str, params: dict[str, ty.Any] | None = None,
        fds: ty.Sequence[int] = (), timeout_s: float | None = None,
    ) -> dict[str, ty.Any]:
        with self._connect() as connection:
            return connection.call(
                verb, params or {}, fds, timeout_s or self._timeout_s)

    def _connect(self) -> _Connection:
        try:
            return _Connection(self._path, self._timeout_s)
        except errors.ContainerError:
            if self._python is None:
                raise
        # Nothing has been asked for yet, so asking a new one is safe.
        with self._reviving:
            self._revive(self._python)
        return _Connection(self._path, self._timeout_s)

    def _revive(self, python: str) -> None:
        """Start a keeper in place of one that was killed.

        It takes up what the old one has written down. One of an init system
        has kept the consoles there too, so that has a moment to restart it.
        """
        end = time.monotonic() + (
            _RESTART_TIMEOUT if 'INVOCATION_ID' in os.environ else 0.0)
        while time.monotonic() < end:
            with contextlib.suppress(errors.ContainerError):
                _Connection(self._path, self._timeout_s).close()
                return
            time.sleep(0.1)
        LOG.warning('The keeper at %s is gone; starting another', self._path)
        ensure_keeper(self._path, python)

    def ping(self) -> dict[str, ty.Any]:
        """``{"version", "pid", "features"}``; older ones have no features.
        """
        return self._call('ping')

    def _has(self, feature: str) -> bool:
        """Whether the keeper that is there now knows a parameter."""
        found = feature in self.ping().get('features', ())
        if not found:
            LOG.warning(
                'The keeper at %s is older than this agent and does not know '
                '%s; doing without. Restart it when no container runs here',
                self._path, feature)
        return found

    def run(
        self,
        argv: ty.Sequence[str],
        *,
        env: ty.Mapping[str, str] | None = None,
        cwd: str = '/',
        fds: ty.Mapping[int, int] | None = None,
        cgroup_procs: ty.Sequence[str | os.PathLike[str]] = (),
        timeout_s: float = 60.0,
    ) -> RunResult:
        """Run a command to its end as a child of the keeper.

        What the command leaves behind becomes the keeper's child too.
        Unless ``fds`` says otherwise, stdin is /dev/null and of stdout and
        stderr the ends are returned; a process that is left behind and
        writes there later gets SIGPIPE.

        :param env: the whole environment; None: PATH and LC_ALL only
        :param fds: number in the command → descriptor here
        :param cgroup_procs: ``cgroup.procs`` files that the command's
            process joins before it executes
        :param timeout_s: then the command's process group is killed and
            ``timeout`` raised
        :raises ContainerError: ``internal`` with the step that failed (join
            of a cgroup, exec) if the command could not be started
        """
        numbers, passed = self._fds(fds)
        return ty.cast(RunResult, self._call('run', {
            'argv': list(argv), 'env': None if env is None else dict(env),
            'cwd': cwd, 'fds': numbers,
            'cgroup_procs': [os.fspath(p) for p in cgroup_procs],
            'timeout_s': timeout_s,
        }, passed, timeout_s + RUN_MARGIN))

    def spawn(
        self,
        argv: ty.Sequence[str],
        *,
        env: ty.Mapping[str, str] | None = None,
        cwd: str = '/',
        fds: ty.Mapping[int, int] | None = None,
        cgroup_procs: ty.Sequence[str | os.PathLike[str]] = (),
    ) -> int:
        """Start a long-lived child of the keeper; returns its pid.

        Standard streams that ``fds`` does not have are /dev/null. To learn
        of its end, :meth:`watch` it.
        """
        numbers, passed = self._fds(fds)
        return int(self._call('spawn', {
            'argv': list(argv), 'env': None if env is None else dict(env),
            'cwd': cwd, 'fds': numbers,
            'cgroup_procs': [os.fspath(p) for p in cgroup_procs],
        }, passed)['pid'])

    @staticmethod
    def _fds(
        fds: ty.Mapping[int, int] | None
    ) -> tuple[list[int], list[int]]:
        return list(fds or {}), list((fds or {}).values())

    def watch(
        self, uuid: str, pid: int, exit_path: str | os.PathLike[str],
        start_time: int | None = None,
    ) -> bool:
        """Have the exit of a process written to ``exit_path``.

        The file is replaced atomically with ``{"format": 1, "pid", "code",
        "signal", "at"}``, one of code and signal being null; both are when
        the keeper is not the parent and the kernel (before 6.15) does not
        tell. Children of the keeper may have ended before the call.

        :param start_time: field 22 of /proc/PID/stat, to be sure that
            ``pid`` still is who it was
        :returns: whether it has ended already, and is written
        :raises ContainerError: ``not_found`` if there is no such process
            and the keeper knows of no such child
        """
        return bool(self._call('watch', {
            'uuid': uuid, 'pid': pid, 'exit_path': os.fspath(exit_path),
            'start_time': start_time})['exited'])

    def hold(
        self, uuid: str, fd: int, log_path: str | os.PathLike[str],
        max_bytes: int, fresh: bool = False,
    ) -> None:
        """Hand over a pty master; the caller closes its own copy.

        Its output goes to ``log_path`` and ``log_path``.1, which together
        never exceed ``max_bytes``. A second call for the same uuid replaces
        the master; log and viewers go on.

        :param fresh: the guest has not run yet, and shall find a terminal
            that is nobody's, as a machine's console is
        """
        self._call('hold', {
            'uuid': uuid, 'log_path': os.fspath(log_path),
            'max_bytes': max_bytes,
            **({'fresh': True} if fresh and self._has('hold.fresh') else {}),
        }, [fd])

    def attach(
        self, uuid: str, fd: int, mode: ty.Literal['rw', 'ro'] = 'rw'
    ) -> None:
        """Connect a stream socket to the console; the caller closes its own
        copy.

        All viewers read. The latest that came with "rw" writes; when it
        leaves, the one before. A viewer that does not read loses the oldest
        output, nothing else.

        :raises ContainerError: ``not_found``
        """
        self._call('attach', {'uuid': uuid, 'mode': mode}, [fd])

    def resize(self, uuid: str, rows: int, columns: int) -> None:
        """Set the size of the console's window."""
        self._call('resize', {
            'uuid': uuid, 'rows': rows, 'columns': columns})

    def release(self, uuid: str) -> bool:
        """Let the console go, after its last output; False: there was none.
        """
        return bool(self._call('release', {'uuid': uuid})['released'])

    def list(self) -> list[Entry]:
        """Consoles that are held and exits that are awaited, by uuid."""
        entries: list[Entry] = []
        more = True
        while more:
            after = entries[-1]['uuid'] if entries else None
            page = self._call('list', {'after': after})
            entries += page['entries']
            more = page['more']
        return entries

    def subscribe(self) -> Subscription:
        """All exits from now on."""
        connection = self._connect()
        try:
            connection.call('subscribe', {}, (), self._timeout_s)
        except BaseException:
            connection.close()
            raise
        return Subscription(connection)


def command(
    socket_path: str | os.PathLike[str], python: str = sys.executable
) -> tuple[list[str], dict[str, str]]:
    """How a keeper is started: arguments and environment.

    Without the site module (-S), which would double its memory. So the
    package is found through its directory, which comes after the standard
    library's: nothing else in it is to be imported.
    """
    names = ('PATH', 'LC_ALL', 'LANG', 'NOTIFY_SOCKET',
             'LISTEN_FDS', 'LISTEN_FDNAMES', 'LISTEN_PID')
    return (
        [python, '-I', '-S', '-c', _START, str(_PACKAGE), '--socket',
         os.fspath(socket_path)],
        {name: os.environ[name] for name in names if name in os.environ},
    )


def _open_files() -> str:
    return ('unlimited' if _OPEN_FILES == resource.RLIM_INFINITY
            else str(_OPEN_FILES))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def ensure_keeper(
    socket_path: str | os.PathLike[str], python: str = sys.executable,
    timeout_s: float = ANSWER_TIMEOUT,
) -> dict[str, ty.Any]:
    """Start a keeper unless one answers; returns what it says to a ping.

    It gets a session of its own and survives the caller. Its log is
    ``<socket_path>.log``.

    :raises ContainerError: ``keeper_unavailable``; ``unsupported`` if one of
        another version is there, which only an operator may replace
    """
    path = os.fspath(socket_path)
    client = KeeperClient(path, timeout_s)
    try:
        os.makedirs(os.path.dirname(path) or '.', mode=0o755, exist_ok=True)
        lock = open(f'{path}.start', 'w', opener=_private)
    except OSError as e:
        raise _unavailable('the keeper does not start', str(e)) from e
    with lock:
        # Two starters: the second finds the keeper of the first. All that
        # the holder does has a time-out, and the lock dies with it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            with socket.socket(
                    socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.settimeout(timeout_s)
                probe.connect(path)
            return client.ping()
        argv, env = command(path, python)
        # The agent's own service, if that is who starts it, is not its.
        for name in [n for n in env if n.startswith(('NOTIFY', 'LISTEN'))]:
            del env[name]
        with open(f'{path}.log', 'ab', opener=_private) as log:
            try:
                subprocess.run(
                    ['prlimit', f'--nofile={_open_files()}:', *argv,
                     '--detach'], env=env, cwd='/', check=True,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    timeout=timeout_s)
            except (OSError, subprocess.SubprocessError) as e:
                raise _unavailable(
                    'the keeper does not start',
                    f'{e}; see {path}.log') from e
        return client.ping()
