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

"""Undo what a multi-step change of the host has done, when it fails.

Every change that takes more than one step runs inside ``with
Reverter(...)``; each step names itself, so that an error can say where it
happened and a test can fail each step in turn.
"""

import collections.abc as cabc
import contextlib
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults

LOG = logging.getLogger(__name__)

#: Called with the name of each step before it runs. The fault tests put a
#: function here that raises; it is None in production.
fault_hook: ty.Callable[[str], None] | None = None


class Reverter:
    """A list of undo functions, run backwards unless the change succeeds.

    Undo functions must be idempotent: the step that they undo may have done
    nothing, a part, or all of its work when it failed.
    """

    def __init__(self, uuid: str | None = None) -> None:
        self._uuid = uuid
        self._undo: list[tuple[str, ty.Callable[[], object]]] = []
        self.current: str | None = None
        self._done = False

    def __enter__(self) -> 'Reverter':
        return self

    @contextlib.contextmanager
    def step(
        self, name: str, undo: ty.Callable[[], object] | None = None
    ) -> cabc.Iterator[None]:
        """Run the body as the step ``name``.

        ``undo`` is registered before the body runs, because a body that fails
        half-way needs it too.
        """
        self.current = name
        if undo is not None:
            self._undo.append((name, undo))
        try:
            if fault_hook is not None:
                fault_hook(name)
            faults.point(name)
            yield
        except errors.ContainerError as e:
            e.step = e.step or name
            e.uuid = e.uuid or self._uuid
            raise
        except OSError as e:
            code = 'no_space' if e.errno in errors.FULL else 'internal'
            raise errors.ContainerError(
                code, f'{name} failed', uuid=self._uuid, step=name,
                cause=str(e),
                remedy='See the log of pycontainer-agent on that host',
            ) from e

    def success(self) -> None:
        """The change is whole: forget how to undo it."""
        self._done = True
        self._undo.clear()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: types.TracebackType | None,
    ) -> None:
        if exc is None and self._done:
            return
        while self._undo:
            name, undo = self._undo.pop()
            try:
                undo()
            except Exception:
                # The first error is the one to report; this one would hide
                # it, and the remaining steps must still be undone.
                LOG.exception('undo of step %s failed', name)
