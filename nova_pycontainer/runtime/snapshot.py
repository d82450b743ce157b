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

"""One snapshot that is being made, and what others may do about it."""

import collections.abc as cabc
import contextlib
import threading
import typing as ty

from nova_pycontainer.runtime import errors

#: Seconds.
LET_GO_TIMEOUT: ty.Final = 60.0


class Ended(Exception):
    """The container ended, or was started, in the middle."""


class Claim:
    """One snapshot's claim to a container's disk."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self._lock = threading.Lock()
        self._breakers: list[cabc.Callable[[], object]] = []
        self._reason: str | None = None
        self._container_ended = False
        #: It reads the disk of a container that is down.
        self.whole = False
        #: It reads the disk of a container that is not.
        self.copying = False
        self.let_go = threading.Event()
        self.let_go.set()
        self.ended = threading.Event()

    def abort(self, reason: str) -> None:
        """Have it fail soon."""
        with self._lock:
            self._reason = self._reason or reason
            breakers = [*self._breakers]
        self._break(breakers)

    @staticmethod
    def _break(breakers: cabc.Iterable[cabc.Callable[[], object]]) -> None:
        for breaker in breakers:
            # It may just be over.
            with contextlib.suppress(OSError):
                breaker()

    def container_ends(self) -> None:
        """Have it let go of the disk soon, if it has it."""
        with self._lock:
            if not self.copying:
                return
            self._container_ended = True
            breakers = [*self._breakers]
        self._break(breakers)
        self.let_go.wait(LET_GO_TIMEOUT)

    def check(self) -> None:
        """:raises ContainerError: ``aborted``"""
        if self._reason is not None:
            raise errors.ContainerError(
                'aborted', 'the snapshot was given up', uuid=self.uuid,
                cause=self._reason)
        if self._container_ended:
            raise Ended

    @contextlib.contextmanager
    def breakable(
        self, breaker: cabc.Callable[[], object]
    ) -> cabc.Iterator[None]:
        """Do something that ``breaker`` makes fail."""
        with self._lock:
            self._breakers.append(breaker)
        try:
            self.check()
            yield
        except (OSError, errors.ContainerError):
            # Of what was broken.
            self.check()
            raise
        finally:
            with self._lock:
                self._breakers.remove(breaker)

    def begin_copying(self) -> None:
        with self._lock:
            self._container_ended = False
            self.copying = True
            self.let_go.clear()

    def end_copying(self) -> None:
        with self._lock:
            self.copying = self._container_ended = False
            self.let_go.set()
