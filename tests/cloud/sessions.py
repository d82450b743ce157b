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

"""An ssh session that is in use."""

import contextlib
import subprocess
import threading
import time

from tests.cloud import base

#: Ends what hangs; nothing is measured by it.
_PATIENCE = 120.0


class Session:
    """An ssh session into a server, in which numbered lines go to and fro.

    ssh protects every byte by a MAC: a session in which one was lost,
    repeated or changed is no more.
    """

    def __init__(self, address: str) -> None:
        self._process = subprocess.Popen(
            [*base.SSH, f'debian@{address}', 'cat'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stop = threading.Event()
        self._sent = 0
        self._received = 0
        #: The longest time in which nothing came back, in seconds.
        self.longest = 0.0
        self._last: float | None = None
        self._threads = [threading.Thread(target=target, daemon=True)
                         for target in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        with contextlib.suppress(OSError), self._process.stdin as stream:
            while not self._stop.wait(0.02):
                stream.write(b'%d\n' % self._sent)
                stream.flush()
                self._sent += 1

    def _receive(self) -> None:
        for line in self._process.stdout:
            if int(line) != self._received:
                return
            self._received += 1
            now = time.monotonic()
            if self._last is not None:
                self.longest = max(self.longest, now - self._last)
            self._last = now

    def come(self) -> bool:
        """Whether lines have come since this was asked last."""
        before = getattr(self, '_seen', 0)
        self._seen = self._received
        return self._received > before

    def finish(self) -> str:
        """End it.

        :returns: what there is to complain of, or ''
        """
        self._stop.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process.stdout.close()
        if code or not self._sent or self._sent != self._received:
            return (f'{self._sent} lines sent, {self._received} came back, '
                    f'ssh ended with {code}')
        return ''
