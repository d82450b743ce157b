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

"""Somebody at the console of a guest."""

import select
import time

from tests.runtime import base


class Terminal:
    """What somebody at a console sees and types."""

    def __init__(self, stream):
        self._socket = stream
        self.close = self._socket.close
        self.output = b''

    def type(self, text):
        self._socket.sendall(text)

    def wait_for(self, text):
        end = time.monotonic() + base.PATIENCE
        while text not in self.output:
            left = end - time.monotonic()
            if left <= 0 or not select.select(
                    [self._socket], [], [], left)[0]:
                raise AssertionError(f'no {text!r} in {self.output!r}')
            self.output += self._socket.recv(65536)
