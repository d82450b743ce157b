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

"""Every call that a stopped thread can be in: begun again, or left alone."""

import types

import testtools

from nova_pycontainer.runtime.migration import registers
from nova_pycontainer.runtime.migration import sleepers

EINTR = (1 << 64) - 4
IP = 0x7F0000001002
SECOND = 10 ** 9


def thread(call, *arguments, ax=EINTR, names=('di', 'si', 'dx', 'r10', 'r8',
                                              'r9')):
    regs = types.SimpleNamespace(
        ax=ax, orig_ax=call, ip=IP, di=0, si=0, dx=0, r10=0, r8=0, r9=0,
        bx=0, cx=0, bp=0)
    for name, value in zip(names, arguments, strict=False):
        setattr(regs, name, value)
    return regs


def patch(regs, asleep=None, *, usual=True, now=100 * SECOND,
          interrupted=False, compat=False):
    return registers.Registers(
        regs, asleep, usual, now, interrupted, compat).patch()


#: Since 10 s.
KNOWN = {'call': 0, 'since': 90 * SECOND, 'asked': None}


class TestRegisters(testtools.TestCase):

    def again(self, regs, call):
        self.assertEqual((call, IP - 2), (regs.ax, regs.ip))

    def alone(self, regs, *args, **kwargs):
        before = dict(vars(regs))
        self.assertFalse(patch(regs, *args, **kwargs))
        self.assertEqual(before, vars(regs))

    def test_nanosleep_with_an_address_for_the_rest(self):
        regs = thread(sleepers.NANOSLEEP, 0x1000, 0x2000)
        self.assertTrue(patch(regs))
        self.again(regs, sleepers.NANOSLEEP)
        self.assertEqual(0x2000, regs.di)

    def test_nanosleep_without_one(self):
        regs = thread(sleepers.NANOSLEEP, 0x1000, 0)
        asleep = {**KNOWN, 'asked': 60 * SECOND}
        self.assertTrue(patch(regs, asleep))
        self.again(regs, sleepers.POLL)
        self.assertEqual((0, 0, 50000), (regs.di, regs.si, regs.dx))

    def test_what_is_left_is_rounded_up(self):
        regs = thread(sleepers.NANOSLEEP, 0x1000, 0)
        self.assertTrue(patch(regs, {**KNOWN, 'asked': 10 * SECOND + 1}))
        self.assertEqual(1, regs.dx)
        regs = thread(sleepers.NANOSLEEP, 0x1000, 0)
        self.assertTrue(patch(regs, {**KNOWN, 'asked': SECOND}))
        self.assertEqual(0, regs.dx)

    def test_nanosleep_that_must_not_become_poll(self):
        for kwargs, asked in (
            ({'usual': False}, 60 * SECOND),
            ({'now': None}, 60 * SECOND),
            ({}, 1 << 62),
            ({}, None),
        ):
            regs = thread(sleepers.NANOSLEEP, 0x1000, 0)
            self.assertTrue(patch(regs, {**KNOWN, 'asked': asked}, **kwargs))
            self.again(regs, sleepers.NANOSLEEP)
            self.assertEqual(0x1000, regs.di)

    def test_clock_nanosleep(self):
        regs = thread(sleepers.CLOCK_NANOSLEEP, 1, 0, 0x1000, 0x2000)
        self.assertTrue(patch(regs))
        self.again(regs, sleepers.CLOCK_NANOSLEEP)
        self.assertEqual((1, 0x2000), (regs.di, regs.dx))
        regs = thread(sleepers.CLOCK_NANOSLEEP, 1, 0, 0x1000, 0)
        self.assertTrue(patch(regs, {**KNOWN, 'asked': 60 * SECOND}))
        self.again(regs, sleepers.POLL)
        # CPU time does not pass while others run.
        regs = thread(sleepers.CLOCK_NANOSLEEP, 2, 0, 0x1000, 0)
        self.assertTrue(patch(regs, {**KNOWN, 'asked': 60 * SECOND}))
        self.again(regs, sleepers.CLOCK_NANOSLEEP)
        # Absolute.
        self.alone(thread(sleepers.CLOCK_NANOSLEEP, 1, 1, 0x1000, 0))

    def test_poll(self):
        regs = thread(sleepers.POLL, 0x1000, 1, 60000)
        self.assertTrue(patch(regs, KNOWN))
        self.again(regs, sleepers.POLL)
        self.assertEqual(50000, regs.dx)
        for timeout in (0xFFFFFFFF, (1 << 64) - 1, 60000):
            regs = thread(sleepers.POLL, 0x1000, 1, timeout)
            self.assertTrue(patch(regs))
            self.again(regs, sleepers.POLL)
            self.assertEqual(timeout, regs.dx)

    def test_epoll_wait(self):
        regs = thread(sleepers.EPOLL_WAIT, 3, 0x1000, 1, 60000)
        self.assertTrue(patch(regs, KNOWN))
        self.again(regs, sleepers.EPOLL_WAIT)
        self.assertEqual(50000, regs.r10)
        regs = thread(sleepers.EPOLL_PWAIT, 3, 0x1000, 1, 0xFFFFFFFF)
        self.assertTrue(patch(regs))
        self.again(regs, sleepers.EPOLL_PWAIT)
        self.alone(thread(sleepers.EPOLL_WAIT, 3, 0x1000, 1, 60000))

    def test_futex(self):
        regs = thread(sleepers.FUTEX, 0x1000, 128, 0, 0x2000)
        self.assertTrue(patch(regs))
        self.assertEqual((0, IP), (regs.ax, regs.ip))
        regs = thread(sleepers.FUTEX, 0x1000, 9 | 128, 0, 0x2000)
        self.assertTrue(patch(regs))
        self.again(regs, sleepers.FUTEX)
        self.alone(thread(sleepers.FUTEX, 0x1000, 6, 0, 0x2000))

    def test_calls_that_stopping_interrupts(self):
        regs = thread(65, 1, 0x1000, 1)  # semop
        self.assertTrue(patch(regs))
        self.again(regs, 65)
        for call, index in ((220, 3), (128, 2), (441, 3), (208, 4)):
            regs = thread(call, *[1] * index, 0)
            self.assertTrue(patch(regs))
            self.again(regs, call)
            self.alone(thread(call, *[1] * index, 0x2000))

    def test_a_continued_call(self):
        regs = thread(sleepers.RESTART, 0x1000, 0x2000)
        self.assertTrue(patch(regs, {**KNOWN, 'call': sleepers.NANOSLEEP}))
        self.again(regs, sleepers.NANOSLEEP)
        # Not known which.
        self.alone(thread(sleepers.RESTART, 0x1000, 0x2000))

    def test_a_signal_waits(self):
        self.alone(thread(sleepers.POLL, 0x1000, 1, 60000), KNOWN,
                   interrupted=True)
        # select: CRIU begins it again, and the handler would run first.
        regs = thread(23, ax=23)
        self.assertTrue(patch(regs, interrupted=True))
        self.assertEqual((EINTR, IP + 2), (regs.ax, regs.ip))
        self.alone(thread(23, ax=23))

    def test_not_in_a_call(self):
        self.alone(thread((1 << 64) - 1))
        # Another result, another call.
        self.alone(thread(sleepers.POLL, 0x1000, 1, 60000, ax=1), KNOWN)
        self.alone(thread(0, 1, 2, 3))

    def test_32_bit(self):
        names = ('bx', 'cx', 'dx', 'si', 'di', 'bp')
        regs = thread(162, 0x1000, 0x2000, ax=0xFFFFFFFC, names=names)
        self.assertTrue(patch(regs, compat=True))
        self.again(regs, 162)
        self.assertEqual(0x2000, regs.bx)
        regs = thread(168, 0x1000, 1, 60000, ax=0xFFFFFFFC, names=names)
        self.assertTrue(patch(regs, KNOWN, compat=True))
        self.again(regs, 168)
        self.assertEqual(50000, regs.dx)
