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

"""What the two agents of a migration say to each other, and write down.

Frames of the control connection (S source, D destination)::

    S  begin     spec, base id, facts of the run, strategy, the image's layer
    D  layer     it does not have that: wanted, False while another migration
                 is bringing it just now
    S  layer     it is served: seq
    D  prepared
    S  files     a pass over its files begins: what, seq, final
    D  files     it is done: seq, bytes, whether it was complete
    S  dumped    what the restore needs beside the images
    D  ready     everything is restored, and frozen
    S  go        after it wrote down that it will never thaw
    D  running
    S  abort     reason;   D  failed  error

On a new connection, after one broke around the commit::

    S  query  ->  D  phase
    D  query  ->  S  phase

Each also has its number, from 1, in its direction of its connection.
"""

import dataclasses
import enum
import pathlib
import queue
import threading
import time
import typing as ty

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import state

#: Of the frames, and of what they mean. Both sides must have the same.
VERSION = 1

STRATEGIES = ('auto', 'stop-and-copy', 'pre-copy', 'post-copy')


class Phase(enum.StrEnum):
    """How far a migration is. Written to ``journal.json`` where it matters.
    """

    PREPARED = 'prepared'
    COPYING = 'copying'
    FROZEN = 'frozen'
    #: Destination: restored, frozen, waiting for "go".
    READY = 'ready'
    #: Source: it will never thaw by itself. Destination: it may run.
    COMMITTED = 'committed'
    RUNNING = 'running'
    COMPLETED = 'completed'
    ABORTED = 'aborted'
    FAILED = 'failed'


ENDED = frozenset([Phase.COMPLETED, Phase.ABORTED, Phase.FAILED])

#: What must be in a frame of a type, and of what kind it is; and what may be.
#: Types of a newer agent's are for whoever waits for another one to refuse.
_FIELDS: ty.Final[dict[str, dict[str, ty.Any]]] = {
    'begin': {'base_id': int, 'run': dict, 'paused': bool},
    'dumped': {'external': dict, 'cgroups': list, 'ramfs': list,
               'moment': dict},
    'failed': {'error': dict},
    'query': {'phase': Phase},
    'phase': {'phase': Phase},
    'facts': {'facts': dict},
}
_MAY_BE: ty.Final[dict[str, ty.Any]] = {
    'strategy': str, 'layer': dict, 'wanted': bool, 'seq': int, 'what': str,
    'final': bool, 'bytes': int, 'complete': bool, 'round': int,
    'rounds': bool, 'overruns': bool, 'lazy': bool, 'parent': str,
    'console': str, 'netdevs': dict, 'neighbours': list, 'addresses': list,
    'reason': str, 'data': str}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to migrate. Times are seconds, sizes bytes."""

    strategy: str = 'auto'
    permit_post_copy: bool = False
    #: Passes over the files end when the rest takes no longer than this.
    max_downtime: float = 0.5
    max_passes: int = 4
    bandwidth: int | None = None
    #: The migration as a whole; None: no limit.
    completion_timeout: float | None = None
    timeout_action: str = 'abort'

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'Options':
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = set(data) - known
        if unknown:
            raise errors.ContainerError(
                'invalid', f'unknown migration options: {sorted(unknown)}')
        options = cls(**data)
        if options.strategy not in STRATEGIES:
            raise errors.ContainerError(
                'invalid', f'{options.strategy!r} is not one of '
                f'{STRATEGIES}')
        return options

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Progress:
    """What a caller may watch. Sizes are bytes, durations seconds."""

    migration: str
    uuid: str
    role: str
    phase: Phase = Phase.PREPARED
    strategy: str | None = None
    error: dict[str, ty.Any] | None = None
    memory_total: int = 0
    memory_sent: int = 0
    disk_sent: int = 0
    #: Of the image's layer, where the destination does not have it.
    layer_total: int = 0
    layer_sent: int = 0
    passes: int = 0
    began_at: float = dataclasses.field(default_factory=time.time)
    ended_at: float | None = None
    #: How long no process of the guest ran, as far as this side knows.
    frozen: float | None = None
    #: Durations of the steps, by their names.
    steps: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)

    def timed(self, name: str) -> '_Timed':
        """Context manager that adds a step's duration."""
        return _Timed(self, name)


class _Timed:
    def __init__(self, progress: Progress, name: str) -> None:
        self._progress, self._name = progress, name

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        steps = self._progress.steps
        steps[self._name] = (steps.get(self._name, 0.0) +
                             time.monotonic() - self._began)


class Journal:
    """``journal.json`` of an instance while it migrates."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._path = directory / 'journal.json'

    def write(self, phase: Phase, **facts: ty.Any) -> None:
        """Durable before it returns: the peer acts on what it is told next.
        """
        state.write_json(
            self._path, {'format': state.FORMAT, 'phase': phase, **facts})

    def read(self) -> dict[str, ty.Any] | None:
        try:
            return state.read_json(self._path)
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        if self._path.parent.exists():
            state.fsync_dir(self._path.parent)


class Frames(ty.Protocol):
    def send(self, frame: dict[str, ty.Any]) -> None: ...

    def recv(self, timeout: float) -> dict[str, ty.Any] | None: ...

    def close(self) -> None: ...


class PeerGone(errors.ContainerError):
    """The control connection broke, or nothing that comes on it can be
    believed: what the peer does is not known.
    """


class PeerFailed(errors.ContainerError):
    """The peer says that it has failed."""


def check(frame: ty.Mapping[str, ty.Any], number: int) -> None:
    """Take nothing for a message that is none, or that has been before.

    :param number: of this one
    :raises ContainerError: ``invalid``
    """
    kind = frame.get('type')
    if not isinstance(kind, str):
        raise _invalid('it has no type')
    # Older agents do not number theirs.
    if frame.get('number', number) != number:
        raise _invalid(f'{kind!r} comes out of turn')
    for name, wanted in _FIELDS.get(kind, {}).items():
        if not _is(frame.get(name), wanted):
            raise _invalid(f'the {name} of {kind!r} is not what it should be')
    for name, wanted in _MAY_BE.items():
        if frame.get(name) is not None and not _is(frame[name], wanted):
            raise _invalid(f'the {name} of {kind!r} is not what it should be')


def _is(value: object, wanted: ty.Any) -> bool:
    if wanted is Phase:
        return value in tuple(Phase)
    # A bool is an int as well.
    return type(value) is wanted


def _invalid(what: str) -> errors.ContainerError:
    return errors.ContainerError(
        'invalid', f'the other host sends no message of a migration: {what}')


class Control:
    """The control connection: frames arrive in a thread, in order."""

    def __init__(self, connection: Frames) -> None:
        self._connection = connection
        self._queue: queue.Queue[
            dict[str, ty.Any] | PeerGone] = queue.Queue()
        self._sending = threading.Lock()
        self._sent = 0
        self._thread = threading.Thread(
            target=self._read, name='control', daemon=True)
        #: Called in the reading thread for frames that cannot wait.
        self.on_abort: ty.Callable[[str], None] | None = None
        #: The peer has hung up, or is not to be believed.
        self.broken = False
        self._thread.start()

    def _read(self) -> None:
        number = 1
        while True:
            cause = None
            try:
                frame = self._connection.recv(3600.0)
                if frame is not None:
                    check(frame, number)
            except errors.ContainerError as e:
                if e.code == 'timeout':
                    # A long pass. A host that is dead is noticed by TCP.
                    continue
                frame = None
                cause = str(e) if e.code == 'invalid' else None
            except OSError:
                frame = None
            if frame is None:
                self.broken = True
                self._queue.put(PeerGone(
                    'invalid' if cause else 'network',
                    'the other host is not understood' if cause else
                    'the other host has hung up', cause=cause))
                return
            number += 1
            if frame['type'] == 'abort' and self.on_abort:
                self.on_abort(str(frame.get('reason')))
            self._queue.put(frame)

    def send(self, kind: str, **fields: ty.Any) -> None:
        try:
            with self._sending:
                self._sent += 1
                self._connection.send(
                    {'type': kind, 'number': self._sent, **fields})
        except (OSError, errors.ContainerError) as e:
            raise PeerGone(
                'network', 'the other host cannot be reached',
                cause=str(e)) from e

    def receive(
        self, timeout: float, wanted: str = 'anything'
    ) -> dict[str, ty.Any]:
        """The next frame.

        :raises PeerGone: the connection broke, nothing came in time, or what
            came is no message
        :raises PeerFailed: the peer failed
        :raises ContainerError: the peer aborted
        """
        try:
            frame = self._queue.get(timeout=timeout)
        except queue.Empty:
            raise PeerGone(
                'timeout', f'the other host said nothing for {timeout:.0f} s '
                f'instead of {wanted!r}') from None
        if isinstance(frame, PeerGone):
            # For whoever waits next.
            self._queue.put(frame)
            raise PeerGone(frame.code, frame.message, cause=frame.cause)
        if frame.get('type') == 'failed':
            raise PeerFailed.from_dict(frame['error'])
        if frame.get('type') == 'abort':
            raise errors.ContainerError(
                'aborted', 'the migration was aborted',
                cause=str(frame.get('reason')))
        return frame

    def expect(self, kind: str, timeout: float,
               **about: ty.Any) -> dict[str, ty.Any]:
        """Like :meth:`receive`; a frame of another type is an error.

        :param about: what must be in it
        """
        frame = self.receive(timeout, kind)
        if frame.get('type') != kind:
            raise errors.ContainerError(
                'invalid', f'the other host said {frame.get("type")!r} '
                f'instead of {kind!r}')
        for name, value in about.items():
            if frame.get(name) != value:
                raise errors.ContainerError(
                    'invalid', f'the other host said {kind!r} of {name} '
                    f'{frame.get(name)!r} instead of {value!r}')
        return frame

    def put(self, kind: str, **fields: ty.Any) -> None:
        """Let whoever receives get this, as if the peer had sent it."""
        self._queue.put({'type': kind, **fields})

    def cancel(self, reason: str) -> None:
        """Let whoever receives stop waiting, as if the peer had aborted."""
        self.put('abort', reason=reason)

    def fail(self, error: errors.ContainerError) -> None:
        """Let whoever receives fail with this."""
        self.put('failed', error=error.to_dict())

    def close(self) -> None:
        self._connection.close()
