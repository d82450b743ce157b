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

import gc
import hashlib
import os
import socket
import subprocess
import threading
import time

from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import relay
from nova_pycontainer.runtime.migration import tls
from tests.unit.runtime.migration import base


class CountingRelay(relay.Relay):
    polls = 0

    def _poll(self, *args):
        self.polls += 1
        super()._poll(*args)


class RelayTestCase(base.ChannelTestCase):

    def setUp(self):
        super().setUp()
        self.expect()

    def socketpair(self, size=None):
        ends = socket.socketpair()
        for end in ends:
            end.settimeout(base.PATIENCE)
            if size is not None:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
            self.addCleanup(end.close)
        return ends

    def side(self, connection, size=None, **kwargs):
        """A program's end of a socket, and the relay of the other end."""
        program, ours = self.socketpair(size)
        started = CountingRelay(connection, ours, **kwargs).start()
        self.addCleanup(started.abort)
        return program, started

    def sides(self, size=None, **kwargs):
        """The ends and relays of A, with the arguments, and of B."""
        ours, theirs = self.pair('pages')
        return (*self.side(ours, size, **kwargs), *self.side(theirs, size))

    def start(self, call, *args):
        thread = threading.Thread(target=call, args=args)
        thread.start()
        self.addCleanup(thread.join)
        return thread

    def send(self, sock, data):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    def assert_rest(self, *relays):
        """Nothing runs hot: in the end they only wait."""
        def at_rest():
            before = sum(one.polls for one in relays)
            time.sleep(0.5)
            return sum(one.polls for one in relays) - before < 10

        base.until(at_rest, 'rest')

    def suppressed(self, call, *args):
        try:
            call(*args)
        except OSError:
            pass

    def read(self, sock):
        data = bytearray()
        while part := sock.recv(1 << 20):
            data += part
        return bytes(data)


class TestRelay(RelayTestCase):

    def check_exchange(self, size, out, back):
        a, relay_a, b, relay_b = self.sides(size)
        out, back = os.urandom(out), os.urandom(back)
        self.start(self.send, a, out)
        self.start(self.send, b, back)
        got = []
        reader = self.start(lambda: got.append(self.read(b)))
        self.assertEqual(hashlib.sha256(back).digest(),
                         hashlib.sha256(self.read(a)).digest())
        reader.join()
        self.assertEqual(hashlib.sha256(out).digest(),
                         hashlib.sha256(got[0]).digest())
        for one in (relay_a, relay_b):
            stats = one.result(base.PATIENCE)
            self.assertEqual(len(out) + len(back), stats.bytes)
            self.assertFalse(one.running)
        self.assertEqual(len(out), relay_a.stats.sent)
        self.assertEqual(len(out), relay_b.stats.received)

    def test_both_ways_at_once(self):
        self.check_exchange(None, 50 << 20, 30 << 20)

    def test_small_pipes(self):
        self.check_exchange(1, 5 << 20, 3 << 20)

    def test_one_way_only(self):
        self.check_exchange(None, 5 << 20, 0)

    def test_nothing(self):
        self.check_exchange(None, 0, 0)

    def test_questions_and_answers(self):
        a, relay_a, b, relay_b = self.sides()
        for n in range(300):
            question = os.urandom(n * 7 % 500 + 1)
            a.sendall(question)
            self.assertEqual(question, b.recv(1000))
            b.sendall(question[::-1])
            self.assertEqual(question[::-1], a.recv(1000))

    def test_half_closed(self):
        a, relay_a, b, relay_b = self.sides()
        a.sendall(b'question')
        a.shutdown(socket.SHUT_WR)
        self.assertEqual(b'question', self.read(b))
        # While one direction has ended.
        self.assert_rest(relay_a, relay_b)
        self.assertTrue(relay_a.running and relay_b.running)
        for _ in range(10):
            b.sendall(b'answer' * 1000)
        b.close()
        self.assertEqual(b'answer' * 10000, self.read(a))
        relay_a.result(base.PATIENCE)
        relay_b.result(base.PATIENCE)

    def test_a_slow_reader(self):
        a, relay_a, b, relay_b = self.sides()
        data = os.urandom(20 << 20)
        self.start(self.send, a, data)
        base.until(lambda: relay_a.stats.sent > 1 << 20, 'some')
        # All pipes are full: nothing is kept in memory without bound.
        self.assert_rest(relay_a, relay_b)
        self.assertLess(relay_a.stats.sent, len(data))
        self.assertEqual(data, self.read(b))

    def test_real_programs(self):
        tree = self.dir / 'tree'
        (tree / 'deep').mkdir(parents=True)
        for n in range(50):
            (tree / 'deep' / str(n)).write_bytes(os.urandom(n * 9973))
        copy = self.dir / 'copy'
        copy.mkdir()
        a, relay_a, b, relay_b = self.sides()
        # A program's end blocks, as it would for its own.
        for end in (a, b):
            end.setblocking(True)
        with (subprocess.Popen(['tar', '-C', tree, '-cf', '-', '.'],
                               stdout=a) as pack,
              subprocess.Popen(['tar', '-C', copy, '-xf', '-'],
                               stdin=b) as unpack):
            a.close()
            b.close()
            self.assertEqual(0, pack.wait(base.PATIENCE))
            self.assertEqual(0, unpack.wait(base.PATIENCE))
        relay_a.result(base.PATIENCE)
        relay_b.result(base.PATIENCE)
        for n in range(50):
            self.assertEqual((tree / 'deep' / str(n)).read_bytes(),
                             (copy / 'deep' / str(n)).read_bytes())

    def test_shared_statistics(self):
        stats = relay.Stats()
        for _ in range(3):
            a, relay_a, b, relay_b = self.sides(stats=stats)
            self.send(a, b'x' * 1000)
            b.sendall(b'y' * 10)
            b.close()
            self.read(a)
            relay_a.result(base.PATIENCE)
            a.close()
        self.assertEqual((3000, 30, 3030),
                         (stats.sent, stats.received, stats.bytes))


class TestLimit(RelayTestCase):

    def test_the_rate(self):
        # Time only ever gets longer: no machine is too slow for this.
        limiter = bandwidth.Bandwidth(2 << 20)
        began = time.monotonic()
        a, relay_a, b, _ = self.sides(limiter=limiter)
        self.start(self.send, a, bytes(2 << 20))
        self.assertEqual(2 << 20, len(self.read(b)))
        self.assertGreater(time.monotonic() - began, 0.7)

    def test_it_is_shared(self):
        limiter = bandwidth.Bandwidth(2 << 20)
        began = time.monotonic()
        ends = [self.sides(limiter=limiter) for _ in range(3)]
        for a, _, _, _ in ends:
            self.start(self.send, a, bytes(1 << 20))
        for _, _, b, _ in ends:
            self.assertEqual(1 << 20, len(self.read(b)))
        self.assertGreater(time.monotonic() - began, 1.0)

    def test_answers_are_not_held_up(self):
        limiter = bandwidth.Bandwidth(1)
        a, relay_a, b, _ = self.sides(limiter=limiter)
        sender = self.start(self.suppressed, self.send, a, bytes(1 << 20))
        b.recv(1)
        b.sendall(b'answer')
        self.assertEqual(b'answer', a.recv(100))
        self.assert_rest(relay_a)
        relay_a.abort()
        sender.join()

    def test_it_is_lifted(self):
        limiter = bandwidth.Bandwidth(1)
        a, relay_a, b, _ = self.sides(limiter=limiter, idle_s=2)
        self.start(self.send, a, bytes(4 << 20))
        b.recv(1)
        time.sleep(3)
        # To wait for the limit is not to be idle.
        self.assertTrue(relay_a.running)
        limiter.rate = None
        self.assertEqual((4 << 20) - 1, len(self.read(b)))


class TestFailures(RelayTestCase):

    def test_abort(self):
        a, relay_a, b, relay_b = self.sides()
        a.sendall(b'x')
        b.recv(1)
        relay_a.abort()
        relay_a.abort()
        self.assertEqual('aborted', relay_a.error.code)
        self.assertFalse(relay_a.running)
        self.assertEqual(b'', a.recv(1))
        # The other side does not take it for an end.
        self.assertTrue(relay_b.wait(base.PATIENCE))
        self.assertEqual('network', relay_b.error.code)
        self.assertEqual(b'', b.recv(1))
        self.refused(relay_b.result, 1, code='network')

    def test_abort_with_full_pipes(self):
        a, relay_a, b, relay_b = self.sides()
        sender = self.start(self.suppressed, self.send, a, bytes(50 << 20))
        base.until(lambda: relay_a.stats.sent > 1 << 20, 'some')
        relay_a.abort()
        sender.join()
        self.assertEqual('aborted', relay_a.error.code)
        relay_b.abort()
        self.assertFalse(relay_b.running)

    def test_abort_while_all_flows(self):
        class NeverPolls(relay.Relay):
            def _poll(self, *args):
                # As if something could be done at any time.
                pass

        ours, theirs = self.pair('pages')
        a, end = self.socketpair()
        one = NeverPolls(ours, end).start()
        self.addCleanup(one.abort)
        a.sendall(b'x')
        base.until(lambda: one.stats.sent, 'it')
        one.abort()
        self.assertFalse(one.running)
        self.assertEqual('aborted', one.error.code)

    def test_abort_under_a_limit(self):
        a, relay_a, b, relay_b = self.sides(limiter=bandwidth.Bandwidth(1))
        a.sendall(bytes(100000))
        b.recv(1)
        relay_a.abort()
        self.assertEqual('aborted', relay_a.error.code)

    def test_abort_before_it_starts(self):
        ours, theirs = self.pair('pages')
        program, end = self.socketpair()
        one = relay.Relay(ours, end)
        one.abort()
        self.assertEqual(b'', program.recv(1))
        self.assertTrue(ours.closed)
        self.assertFalse(one.running)

    def test_the_connection_is_aborted(self):
        ours, theirs = self.pair('pages')
        a, relay_a = self.side(ours)
        ours.abort()
        self.assertTrue(relay_a.wait(base.PATIENCE))
        self.assertEqual('network', relay_a.error.code)

    def test_the_plain_socket_is_closed(self):
        ours, theirs = self.pair('pages')
        program, end = self.socketpair()
        one = relay.relay(ours, end)
        end.close()
        program.close()
        one.abort()
        self.assertEqual('aborted', one.error.code)
        self.assertNotIn('Traceback', self.log.output)

    def test_cut_on_the_way(self):
        proxy = base.Proxy(self.listener.port, lambda data, *_: data)
        self.addCleanup(proxy.close)
        ours, theirs = self.pair('pages', port=proxy.port)
        a, relay_a = self.side(ours)
        b, relay_b = self.side(theirs)
        a.sendall(b'x')
        b.recv(1)
        proxy.cut()
        for program, one in ((a, relay_a), (b, relay_b)):
            self.assertTrue(one.wait(base.PATIENCE))
            self.assertEqual('network', one.error.code)
            self.assertEqual(b'', program.recv(1))

    def test_buffers_go_at_the_end(self):
        """Also of one whose error somebody keeps."""
        def buffers():
            return sum(1 for o in gc.get_objects()
                       if type(o) is memoryview and o.nbytes >= tls.CHUNK)

        gc.disable()
        self.addCleanup(gc.enable)
        before = buffers()
        a, relay_a, b, relay_b = self.sides()
        a.sendall(b'x')
        b.recv(1)
        self.assertLess(before, buffers())
        relay_a.abort()
        for one in (relay_a, relay_b):
            self.assertTrue(one.wait(base.PATIENCE))
            self.assertIsNotNone(one.error)
        # Its thread has one in its hands a little longer.
        deadline = time.monotonic() + base.PATIENCE
        while buffers() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertEqual(before, buffers())

    def test_nothing_for_too_long(self):
        a, relay_a, b, relay_b = self.sides(idle_s=0.3)
        self.assertTrue(relay_a.wait(base.PATIENCE))
        self.assertEqual('timeout', relay_a.error.code)
        self.assertTrue(relay_b.wait(base.PATIENCE))

    def test_a_program_ends_without_reading(self):
        # rsync's last words must arrive, although it has not read ours.
        for _ in range(2):
            a, relay_a, b, relay_b = self.sides()
            a.sendall(b'unread' * 100)
            # Until it could be read.
            base.until(lambda end=b: len(
                end.recv(1000, socket.MSG_PEEK)) == 600, 'it')
            b.sendall(b'last words' * 1000)
            b.close()
            self.assertEqual(b'last words' * 1000, self.read(a))
            self.assertTrue(relay_b.wait(base.PATIENCE))
            self.assertEqual('network', relay_b.error.code)
            a.close()
            self.assertTrue(relay_a.wait(base.PATIENCE))

    def test_a_program_ends_while_much_comes(self):
        a, relay_a, b, relay_b = self.sides()
        sender = self.start(self.suppressed, self.send, a, bytes(50 << 20))
        b.recv(100)
        b.sendall(b'no more')
        b.close()
        self.assertEqual(b'no more', a.recv(100))
        self.assertTrue(relay_b.wait(base.PATIENCE))
        self.assertTrue(relay_a.wait(base.PATIENCE))
        sender.join()
        self.assertIsNotNone(relay_b.error)

    def test_a_program_is_killed(self):
        a, relay_a, b, relay_b = self.sides()
        b.close()
        self.assertEqual(b'', self.read(a))
        a.close()
        relay_a.result(base.PATIENCE)
        relay_b.result(base.PATIENCE)

    def test_too_early(self):
        a, relay_a, b, relay_b = self.sides()
        self.refused(relay_a.result, 0.01, code='timeout')
        self.assertTrue(relay_a.running)
