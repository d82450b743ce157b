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

"""All consoles of the host: they meet the keeper's loop here."""

import collections.abc as cabc
import os
import socket
import typing as ty

from nova_pycontainer.runtime import keeper_console
from nova_pycontainer.runtime import keeper_loop
from nova_pycontainer.runtime import keeper_memory
from nova_pycontainer.runtime import keeper_params

Params = dict[str, ty.Any]


class Consoles:
    """uuid → console."""

    def __init__(
        self, loop: keeper_loop.Loop, log: cabc.Callable[[str], None],
        memory: keeper_memory.Memory,
    ) -> None:
        self._loop = loop
        self._log = log
        self._memory = memory
        self._held: dict[str, keeper_console.Console] = {}

    def describe(self) -> dict[str, Params]:
        return {uuid: held.describe() for uuid, held in self._held.items()}

    def _get(self, params: Params) -> keeper_console.Console:
        held = self._held.get(params['uuid'])
        if held is None:
            raise keeper_params.Refused(
                'not_found', f'no console is held for {params["uuid"]}')
        return held

    # Verbs

    def hold(self, params: Params, fds: list[int]) -> Params:
        """Take over a pty master, in place of a former one.

        Viewers of the former one stay.
        """
        if not os.isatty(fds[0]):
            raise keeper_params.Refused('invalid', 'not a terminal')
        if params.get('fresh'):
            try:
                keeper_console.disown(fds[0])
            except OSError as e:
                # The guest can live with it.
                self._log(f'{params["uuid"]}: the console stays its init\'s '
                          f'controlling terminal: {e}')
        self.take(params['uuid'], keeper_memory.Console(
            params['log_path'], params['max_bytes']), fds)
        return {}

    def take(
        self, uuid: str, kept: keeper_memory.Console, fds: list[int]
    ) -> None:
        """Take the master over, out of ``fds``.

        :raises OSError: its log cannot be written
        """
        ring = keeper_console.LogRing(kept.log_path, kept.max_bytes)
        ring.open()
        held = self._held.get(uuid)
        if held is None:
            held = self._held[uuid] = keeper_console.Console(uuid, ring)
        else:
            self._drop_master(held)
            held.ring.close()
            # The former ring may have written to the same file just now.
            ring.close()
            held.ring = ring
        master = fds.pop(0)
        held.use(master)
        self._memory.console(uuid, kept, master)
        self._look(held)

    def attach(self, params: Params, fds: list[int]) -> Params:
        """Connect a viewer's stream socket to the console."""
        held = self._get(params)
        try:
            sock = socket.socket(fileno=fds[0])
        except OSError as e:
            raise keeper_params.Refused(
                'invalid', 'not a socket', cause=e.strerror) from e
        # From here it is the socket object's to close.
        fds.pop(0)
        if sock.type != socket.SOCK_STREAM:
            sock.close()
            raise keeper_params.Refused('invalid', 'not a stream socket')
        held.viewers.append(keeper_console.Viewer(
            sock, params.get('mode', 'rw') == 'rw'))
        self._look(held)
        return {}

    def resize(self, params: Params) -> Params:
        self._get(params).resize(params['rows'], params['columns'])
        return {}

    def release(self, params: Params) -> Params:
        """Let the master and its viewers go. The log stays."""
        held = self._held.pop(params['uuid'], None)
        if held is None:
            return {'released': False}
        self._memory.forget_console(held.uuid)
        self._drop_master(held)
        for viewer in list(held.viewers):
            # What it can take of the last words, it gets.
            try:
                viewer.flush()
            except OSError:
                pass
            self._drop_viewer(held, viewer)
        held.ring.close()
        return {'released': True}

    # Events

    def _look(self, held: keeper_console.Console) -> None:
        """Ask for the events that the console and its viewers need now."""
        if held.master is not None and not held.idle:
            events = keeper_loop.READ
            if held.input_pending:
                events |= keeper_loop.WRITE
            self._loop.watch(held.master, events,
                             lambda mask: self._on_master(held, mask))
        for viewer in list(held.viewers):
            self._look_viewer(held, viewer)

    def _look_viewer(
        self, held: keeper_console.Console, viewer: keeper_console.Viewer
    ) -> None:
        try:
            events = 0 if viewer.flush() else keeper_loop.WRITE
        except OSError:
            self._drop_viewer(held, viewer)
            return
        if not (held.input_full and viewer is held.writer()):
            events |= keeper_loop.READ
        self._loop.watch(viewer.sock.fileno(), events,
                         lambda mask: self._on_viewer(held, viewer, mask))

    def _on_master(self, held: keeper_console.Console, mask: int) -> None:
        opened = True
        try:
            if mask & keeper_loop.WRITE:
                held.flush_input()
            if mask & keeper_loop.READ:
                opened = held.read()
        except OSError as e:
            self._log(f'console of {held.uuid}: {e}')
            opened = False
        if not opened:
            self._sleep(held)
        self._look(held)

    def _sleep(self, held: keeper_console.Console) -> None:
        """Look again later: systemd closes and opens the console at will.

        epoll would report the hang-up all the time until then.
        """
        if held.master is None:
            return
        self._loop.forget(held.master)
        held.idle = True
        generation, delay = held.generation, held.retry
        held.retry = min(held.retry * 2, keeper_console.RETRY_MAX)

        def retry() -> None:
            if held.master is not None and held.generation == generation:
                held.idle = False
                self._on_master(held, keeper_loop.READ)

        self._loop.after(delay, retry)

    def _on_viewer(
        self, held: keeper_console.Console, viewer: keeper_console.Viewer,
        mask: int,
    ) -> None:
        if mask & keeper_loop.READ:
            try:
                data = viewer.sock.recv(4096)
            except BlockingIOError:
                data = None
            except OSError:
                data = b''
            if data == b'':
                self._drop_viewer(held, viewer)
            elif data:
                held.type(viewer, data)
        # Of the others too: the input may have become full, or free.
        self._look(held)

    def _drop_viewer(
        self, held: keeper_console.Console, viewer: keeper_console.Viewer
    ) -> None:
        if viewer in held.viewers:
            held.viewers.remove(viewer)
            self._loop.forget(viewer.sock.fileno())
            viewer.sock.close()

    def _drop_master(self, held: keeper_console.Console) -> None:
        if held.master is None:
            return
        try:
            # The last words of the guest, but no more than fit a pty.
            for _ in range(4):
                if not held.read():
                    break
        except OSError as e:
            self._log(f'console of {held.uuid}: {e}')
        self._loop.forget(held.master)
        os.close(held.master)
        held.master = None
