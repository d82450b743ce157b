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

"""Events of a host's containers, for whoever wants to follow them."""

import collections
import dataclasses
import threading
import time
import typing as ty

_KEEP = 4096
#: An agent of more than a day's standing answers at least this often.
_MAX_WAIT = 300.0


@dataclasses.dataclass(frozen=True)
class Event:
    """``type`` is started, stopped, paused, unpaused or rebooted."""

    seq: int
    type: str
    uuid: str
    at: float
    exit: dict[str, ty.Any] | None = None

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


class EventLog:
    """The last events. Sequence numbers grow over restarts of the agent."""

    def __init__(self) -> None:
        # Milliseconds: a restarted agent begins above what the last one has
        # given out, unless that made more than a thousand events a second.
        self._next = int(time.time() * 1000)
        self._events: collections.deque[Event] = collections.deque(
            maxlen=_KEEP)
        self._changed = threading.Condition()
        self._closed = False

    def add(
        self, kind: str, uuid: str, ended: dict[str, ty.Any] | None = None
    ) -> None:
        with self._changed:
            self._events.append(
                Event(self._next, kind, uuid, time.time(), ended))
            self._next += 1
            self._changed.notify_all()

    def after(self, seq: int, timeout_s: float) -> list[Event]:
        """Events with a greater number, waiting for one at most so long.

        A caller that has seen none yet gives -1: it gets those that are
        kept.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (
                    self._events and self._events[-1].seq > seq),
                min(timeout_s, _MAX_WAIT))
            return [e for e in self._events if e.seq > seq]

    def close(self) -> None:
        """Let the waiting callers go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
