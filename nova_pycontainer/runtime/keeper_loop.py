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

"""The keeper's event loop: descriptors, timers, and the end."""

import collections.abc as cabc
import heapq
import itertools
import os
import selectors
import signal
import time

Handler = cabc.Callable[[int], None]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE


class Loop:
    """One selector, one heap of timers; single threaded."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[
            tuple[float, int, cabc.Callable[[], None]]] = []
        self._counter = itertools.count()
        self._stop = False

    def run(self, on_child: cabc.Callable[[], None]) -> None:
        """Serve events until SIGTERM or SIGINT.

        :param on_child: called after one or more SIGCHLD
        """
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        # Python needs a handler, or the signal never reaches the pipe.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)

        def wake(_: int) -> None:
            os.read(wake_r, 4096)
            on_child()

        self.watch(wake_r, READ, wake)
        # For children that ended before the handler was there.
        on_child()
        while not self._stop:
            self._turn()

    def _turn(self) -> None:
        timeout = None
        if self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        for key, mask in self._selector.select(timeout):
            # An earlier event of the same turn may have closed or changed it;
            # what is still true will be reported again.
            if self._selector.get_map().get(key.fd) is key:
                key.data(mask)
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _on_stop(self, *_: object) -> None:
        self._stop = True

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call ``handler(mask)`` upon events; 0 events: never again.

        With 0 the descriptor leaves epoll altogether, which would otherwise
        report a hang-up for ever.
        """
        known = fd in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fd)
        elif not known:
            self._selector.register(fd, events, handler)
        elif self._selector.get_key(fd).events != events:
            self._selector.modify(fd, events, handler)

    def forget(self, fd: int) -> None:
        """To be called before ``fd`` is closed: another process may have a
        copy, and then epoll would go on to report it.
        """
        self.watch(fd, 0, lambda _: None)

    def after(self, seconds: float, call: cabc.Callable[[], None]) -> None:
        """Call once, later. There is no cancel: calls look whether they are
        still wanted.
        """
        heapq.heappush(self._timers, (
            time.monotonic() + seconds, next(self._counter), call))
