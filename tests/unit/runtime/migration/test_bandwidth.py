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

import testtools

from nova_pycontainer.runtime.migration import bandwidth


class TestBandwidth(testtools.TestCase):

    def setUp(self):
        super().setUp()
        self.now = 1000.0

    def limiter(self, rate):
        return bandwidth.Bandwidth(rate, lambda: self.now)

    def send(self, limiter, count, chunk):
        """Send as a sender does; return the seconds that it took."""
        began = self.now
        while count > 0:
            while delay := limiter.delay():
                self.now += delay
            limiter.charge(min(chunk, count))
            count -= chunk
        return self.now - began

    def test_unlimited(self):
        limiter = self.limiter(None)
        self.assertEqual(0, self.send(limiter, 1 << 40, 1 << 20))
        self.assertIsNone(limiter.rate)

    def test_the_rate_is_kept(self):
        for rate, chunk in ((1e4, 1000), (1e4, 1 << 18), (1e6, 1000),
                            (1e6, 1 << 18), (1e9, 1 << 18), (1e12, 1 << 30)):
            limiter = self.limiter(rate)
            seconds = self.send(limiter, int(20 * rate), chunk)
            # The first burst, and the last part that is not waited for.
            self.assertGreater(seconds, 20 - 0.11 - chunk / rate)
            self.assertLess(seconds, 20.01)

    def test_what_was_not_used_is_not_saved(self):
        limiter = self.limiter(1e6)
        self.now += 3600
        seconds = self.send(limiter, 10 * 10**6, 10**5)
        self.assertGreater(seconds, 9.7)

    def test_two_senders_share_it(self):
        limiter = self.limiter(1e6)
        began = self.now
        sent = [0, 0]
        while sum(sent) < 10 * 10**6:
            for n in range(2):
                if not limiter.delay():
                    limiter.charge(10**5)
                    sent[n] += 10**5
            self.now += limiter.delay()
        self.assertGreater(self.now - began, 9.7)

    def test_it_never_sends_a_waiting_one_to_sleep_for_long(self):
        limiter = self.limiter(1)
        limiter.charge(10**6)
        self.assertLessEqual(limiter.delay(), 1)
        self.assertGreater(limiter.delay(), 0)
        # Faster: whoever waits goes on when it looks again.
        limiter.rate = 1e9
        self.now += 1
        self.assertEqual(0, limiter.delay())

    def test_changes(self):
        limiter = self.limiter(1e6)
        limiter.charge(10**6)
        limiter.rate = None
        self.assertEqual(0, limiter.delay())
        limiter.charge(10**9)
        limiter.rate = 1e3
        self.assertEqual(1e3, limiter.rate)
        # Nothing is owed for the time without a limit.
        self.assertEqual(0, limiter.delay())
        self.assertGreater(self.send(limiter, 10**4, 100), 9.7)

    def test_impossible_rates(self):
        for rate in (0, -1, float('nan')):
            self.assertRaises(ValueError, bandwidth.Bandwidth, rate)
            limiter = self.limiter(1)
            self.assertRaises(ValueError, setattr, limiter, 'rate', rate)
            self.assertEqual(1, limiter.rate)
