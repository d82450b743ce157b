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

"""A ping that notices how long nobody answered.

Of our own, because ping(8) spins between two requests that are less than
10 ms apart, and takes the processor that it is to measure.
"""

import os
import socket
import struct
import threading
import time

_ECHO, _ECHO_REPLY = 8, 0
_HEADER = struct.Struct('!BBHHH')


def _checksum(data):
    total = sum(struct.unpack(f'!{len(data) // 2}H', data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Ping:
    """A ping every 5 ms; notes the longest silence, in seconds."""

    INTERVAL = 0.005

    def __init__(self, address):
        self._address = address
        self._socket = socket.socket(
            socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.settimeout(0.5)
        # Distinct for each of a process.
        self._ident = (os.getpid() ^ id(self) >> 4) & 0xFFFF
        self._stop = threading.Event()
        self.longest = 0.0
        self.replies = 0
        self._last = time.monotonic()
        self._threads = [threading.Thread(target=target, daemon=True)
                         for target in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self):
        number = 0
        while not self._stop.wait(self.INTERVAL):
            number = (number + 1) & 0xFFFF
            check = _checksum(_HEADER.pack(_ECHO, 0, 0, self._ident, number))
            try:
                self._socket.sendto(_HEADER.pack(
                    _ECHO, 0, check, self._ident, number),
                    (self._address, 0))
            except OSError:
                # No route for a moment, or no buffer: no answer either.
                continue

    def _receive(self):
        while not self._stop.is_set():
            try:
                packet, (source, _) = self._socket.recvfrom(2048)
            except OSError:
                continue
            header = packet[(packet[0] & 15) * 4:][:_HEADER.size]
            kind, _, _, ident, _ = _HEADER.unpack(header)
            if (kind, ident, source) != (
                    _ECHO_REPLY, self._ident, self._address):
                continue
            now = time.monotonic()
            self.longest = max(self.longest, now - self._last)
            self._last = now
            self.replies += 1

    def reset(self):
        longest, self.longest = self.longest, 0.0
        return longest

    def finish(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._socket.close()
