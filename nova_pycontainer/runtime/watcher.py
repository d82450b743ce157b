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

"""Learns of the end of every container's init, from the kernel."""

import os
import selectors
import threading
import typing as ty

from oslo_log import log as logging

LOG = logging.getLogger(__name__)


class Watcher:
    """Waits for pidfds in one thread, and calls back in threads of its own.
    """

    def __init__(self, callback: ty.Callable[[str], None]) -> None:
        self._callback = callback
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._pending: list[tuple[int, str]] = []
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop, name='watcher', daemon=True)
        self._thread.start()

    def add(self, uuid: str, pidfd: int) -> None:
        """Call back with ``uuid`` at the end of the process, once.

        The descriptor is the watcher's from now on.
        """
        with self._lock:
            self._pending.append((pidfd, uuid))
        self._wake()

    def close(self) -> None:
        self._closed = True
        self._wake()
        self._thread.join(10)

    def _wake(self) -> None:
        try:
            os.write(self._wake_w, b'.')
        except BlockingIOError:
            # The pipe is full of wake-ups already.
            pass

    def _loop(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fd == self._wake_r:
                    os.read(self._wake_r, 4096)
                    continue
                self._selector.unregister(key.fd)
                os.close(key.fd)
                # A thread for each: cleaning up after one container must
                # not keep the others' ends waiting.
                threading.Thread(
                    target=self._call, args=(key.data,),
                    name=f'exit-{key.data[:8]}', daemon=True).start()
            with self._lock:
                for pidfd, uuid in self._pending:
                    self._selector.register(
                        pidfd, selectors.EVENT_READ, uuid)
                self._pending.clear()
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        os.close(self._wake_w)

    def _call(self, uuid: str) -> None:
        try:
            self._callback(uuid)
        except Exception:
            LOG.exception('cleaning up after container %s failed', uuid)
