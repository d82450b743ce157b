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

"""A limit for what a migration sends.

Own code: the rate limiters that are kept up count requests, not bytes (they
store one entry per unit), and cannot be changed while somebody waits.
"""

import threading
import time
import typing as ty

#: Seconds of unused bandwidth that may be made up for.
_BURST: ty.Final = 0.1
#: A shorter wait is not worth the system call.
_TICK: ty.Final = 0.001
#: After so many seconds a waiting sender looks whether the rate has changed.
_LOOK: ty.Final = 0.5


class Bandwidth:
    """Bytes per second for all connections of a migration together.

    :param rate: bytes per second; None: unlimited
    :param clock: seconds that never go back
    """

    def __init__(
        self, rate: float | None = None,
        clock: ty.Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = self._checked(rate)
        #: Bytes that may be sent now; negative: sent too early.
        self._credit = 0.0
        self._at = clock()

    @staticmethod
    def _checked(rate: float | None) -> float | None:
        if rate is not None and not rate > 0:
            raise ValueError('a rate is positive')
        return rate

    @property
    def rate(self) -> float | None:
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        """Holds from now on, also for who is waiting."""
        rate = self._checked(rate)
        with self._lock:
            self._advance()
            self._rate = rate
            if rate is None:
                self._credit = 0.0

    def _advance(self) -> None:
        now = self._clock()
        if self._rate is not None:
            self._credit = min(
                self._credit + (now - self._at) * self._rate,
                self._rate * _BURST)
        self._at = now

    def charge(self, count: int) -> None:
        """So many bytes were sent."""
        with self._lock:
            self._advance()
            if self._rate is not None:
                self._credit -= count

    def delay(self) -> float:
        """Seconds to wait before sending more, then ask again; 0: go on."""
        with self._lock:
            self._advance()
            if self._rate is None or self._credit >= 0:
                return 0.0
            return min(max(-self._credit / self._rate, _TICK), _LOOK)
