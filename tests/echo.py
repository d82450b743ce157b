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

"""A TCP stream that notices every lost, repeated or changed byte."""

import socket
import threading
import time

#: Ends what hangs; nothing is measured by it.
PATIENCE = 90.0

#: The service, for a guest that has Python.
SERVICE = """\
import socketserver
class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)
socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("", 7), Handler).serve_forever()
"""


class Echo:
    """A client of a TCP echo service, that checks every byte.

    It sends a numbered line every 5 ms and notes the longest time that none
    came back.

    :param patience: seconds of silence after which it has broken
    """

    def __init__(self, address, port=7, patience=PATIENCE):
        self._sock = self._connect(address, port)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.settimeout(patience)
        self._stop = threading.Event()
        self._sent = 0
        self.received = 0
        self.longest = 0.0
        self.error = None
        self._threads = [
            threading.Thread(target=f, daemon=True)
            for f in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _connect(address, port):
        """The service may be about to start."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return socket.create_connection((address, port), 10)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _send(self):
        try:
            while not self._stop.wait(0.005):
                self._sock.sendall(b'%015d\n' % self._sent)
                self._sent += 1
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as e:
            self.error = self.error or e

    def _receive(self):
        try:
            with self._sock.makefile('rb') as f:
                last = time.monotonic()
                for line in f:
                    now = time.monotonic()
                    self.longest = max(self.longest, now - last)
                    last = now
                    if line != b'%015d\n' % self.received:
                        raise AssertionError(f'{line} is not line '
                                             f'{self.received}')
                    self.received += 1
        except (OSError, AssertionError) as e:
            self.error = self.error or e

    def reset(self):
        longest, self.longest = self.longest, 0.0
        return longest

    def finish(self):
        """End it, and check that all came back."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        self._sock.close()
        if self.error is not None:
            raise AssertionError(f'the stream broke: {self.error!r}')
        if self._sent != self.received or not self.received:
            raise AssertionError(
                f'{self._sent} lines sent, {self.received} came back')
