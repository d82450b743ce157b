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

"""What the keeper remembers over its own restart.

One JSON file per container, beside the socket, so gone with a boot of the
host. The pty masters themselves are put into systemd's descriptor store, if
systemd it is that started the keeper: whoever restarts it, needrestart(8)
after an upgrade of a library for example, hangs up no console.
"""

import collections.abc as cabc
import json
import os
import socket
import typing as ty

FORMAT: ty.Final = 1
#: The first descriptor that systemd passes (sd_listen_fds(3)).
_FIRST_FD: ty.Final = 3


class Watch(ty.NamedTuple):
    """Where the exit of one process is to be written."""

    uuid: str
    pid: int
    start_time: int | None
    exit_path: str


class Console(ty.NamedTuple):
    """How the output of a console is kept."""

    log_path: str
    max_bytes: int


class Notifier:
    """Speaks to systemd (sd_notify(3)), if it is there."""

    def __init__(self) -> None:
        # Children need not know: an OCI runtime that finds it would hand it
        # to the container.
        self._address = os.environ.pop('NOTIFY_SOCKET', '')

    def send(self, state: str, fds: cabc.Sequence[int] = ()) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            # Rather lose a message than stop for a slow systemd.
            sock.settimeout(1)
            sock.connect(self._address.replace('@', '\0', 1))
            socket.send_fds(sock, [state.encode()], fds)

    @staticmethod
    def stored() -> dict[str, int]:
        """Name → descriptor, of those that systemd has kept for us."""
        names = os.environ.pop('LISTEN_FDNAMES', '').split(':')
        pid = os.environ.pop('LISTEN_PID', '')
        count = os.environ.pop('LISTEN_FDS', '')
        if pid != str(os.getpid()) or not count.isdigit():
            return {}
        found = {}
        for number, name in zip(range(int(count)), names):
            os.set_inheritable(_FIRST_FD + number, False)
            found[name] = _FIRST_FD + number
        return found


class Memory:
    """What is awaited and held for each container.

    A disk that is full must not keep a container from starting: what cannot
    be remembered is logged and lost with the next restart only.
    """

    def __init__(
        self, directory: str, notifier: Notifier,
        log: cabc.Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._notifier = notifier
        self._log = log
        self._watches: dict[str, dict[int, Watch]] = {}
        self._consoles: dict[str, Console] = {}
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def load(self) -> tuple[list[Watch], dict[str, tuple[Console, int]]]:
        """What a former keeper awaited, and held if it still is there.

        All of it has to be remembered anew.
        """
        stored = self._notifier.stored()
        watches: list[Watch] = []
        consoles: dict[str, tuple[Console, int]] = {}
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            uuid, kind = os.path.splitext(name)
            try:
                if kind != '.json':
                    raise ValueError('the rest of an unfinished file')
                with open(path) as f:
                    data = json.load(f)
                if data.pop('format') != FORMAT:
                    raise ValueError('unknown format')
                watches += [Watch(uuid, *w) for w in data['watches']]
                if data['console'] and uuid in stored:
                    consoles[uuid] = (
                        Console(*data['console']), stored.pop(uuid))
                elif data['console']:
                    self._log(f'the console of {uuid} is lost')
            except (OSError, ValueError, TypeError, KeyError) as e:
                self._log(f'{path}: {e!r}')
            os.unlink(path)
        for uuid, fd in stored.items():
            os.close(fd)
            self._unstore(uuid)
        return watches, consoles

    def watch(self, watch: Watch) -> None:
        self._watches.setdefault(watch.uuid, {})[watch.pid] = watch
        self._save(watch.uuid)

    def forget_watch(self, watch: Watch) -> None:
        watches = self._watches.get(watch.uuid, {})
        if watches.pop(watch.pid, None) is not None:
            if not watches:
                del self._watches[watch.uuid]
            self._save(watch.uuid)

    def console(self, uuid: str, console: Console, master: int) -> None:
        self._unstore(uuid)
        # Without FDPOLL=0, systemd drops a master whose other end is closed.
        self._tell(f'FDSTORE=1\nFDNAME={uuid}\nFDPOLL=0', [master])
        self._consoles[uuid] = console
        self._save(uuid)

    def forget_console(self, uuid: str) -> None:
        self._unstore(uuid)
        if self._consoles.pop(uuid, None) is not None:
            self._save(uuid)

    def _unstore(self, uuid: str) -> None:
        self._tell(f'FDSTOREREMOVE=1\nFDNAME={uuid}')

    def _tell(self, state: str, fds: cabc.Sequence[int] = ()) -> None:
        try:
            self._notifier.send(state, fds)
        except OSError as e:
            self._log(f'systemd: {e}')

    def _save(self, uuid: str) -> None:
        path = os.path.join(self._directory, f'{uuid}.json')
        watches = [w[1:] for w in self._watches.get(uuid, {}).values()]
        console = self._consoles.get(uuid)
        try:
            if not watches and console is None:
                os.unlink(path)
                return
            with open(f'{path}.new', 'w') as f:
                json.dump({'format': FORMAT, 'watches': watches,
                           'console': console}, f)
            os.replace(f'{path}.new', path)
        except OSError as e:
            self._log(f'{path}: {e}')
