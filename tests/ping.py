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

"""A ping that notices how long nobody answered."""

import os
import subprocess
import threading
import time


class Ping:
    """A ping every 5 ms; notes the longest silence, in seconds."""

    def __init__(self, address):
        self._process = subprocess.Popen(
            ['ping', '-n', '-i', '0.005', address], text=True,
            stdout=subprocess.PIPE, env={**os.environ, 'LC_ALL': 'C'})
        self.longest = 0.0
        self.replies = 0
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self._process.stdout:
            if ' bytes from ' in line:
                now = time.monotonic()
                self.longest = max(self.longest, now - self._last)
                self._last = now
                self.replies += 1

    def reset(self):
        longest, self.longest = self.longest, 0.0
        return longest

    def finish(self):
        self._process.terminate()
        self._process.wait(10)
        self._thread.join(10)
        self._process.stdout.close()
