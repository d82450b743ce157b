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

"""What both sides do with a connection, and what may happen to it."""

import json
import os
import socket
import struct
import threading

from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from tests.unit.runtime.migration import base


class ConnectionTestCase(base.ChannelTestCase):

    def setUp(self):
        super().setUp()
        self.expect()

    def start(self, call, *args):
        """Run something in a thread; returns (thread, results)."""
        results = []

        def work():
            try:
                results.append(call(*args))
            except Exception as e:
                results.append(e)

        thread = threading.Thread(target=work)
        thread.start()
        self.addCleanup(thread.join)
        return thread, results

    def through(self, change, role='control'):
        """Both sides of a connection that somebody sits on."""
        proxy = base.Proxy(self.listener.port, change)
        self.addCleanup(proxy.close)
        return (proxy, *self.pair(role, port=proxy.port))


class TestFrames(ConnectionTestCase):

    def test_both_ways(self):
        ours, theirs = self.pair()
        frames = [{}, {'a': 1, 'b': [None, True, 1.5, 'ü\U0001f600\0']},
                  {'x': 'y' * 500000}]
        for frame in frames:
            ours.send(frame)
        for frame in frames:
            theirs.send(frame)
        for frame in frames:
            self.assertEqual(frame, theirs.recv(base.PATIENCE))
            self.assertEqual(frame, ours.recv(base.PATIENCE))

    def test_the_largest(self):
        ours, theirs = self.pair()
        frame = {'x': 'y' * (channel.MAX_FRAME - 8)}
        self.start(ours.send, frame)
        self.assertEqual(frame, theirs.recv(base.PATIENCE))
        frame['x'] += 'y'
        self.refused(ours.send, frame, code='invalid')
        # Nothing of it was sent.
        ours.send({})
        self.assertEqual({}, theirs.recv(base.PATIENCE))

    def test_the_other_side_sends_what_is_no_frame(self):
        for words in (struct.pack('>I', channel.MAX_FRAME + 1), b'\xff' * 4,
                      b'\0\0\0\0', struct.pack('>I', 2) + b'[]',
                      struct.pack('>I', 5) + b'\xff{}{}'):
            ours, theirs = self.pair()
            ours.send_bytes(words)
            self.refused(theirs.recv, base.PATIENCE, code='invalid')
            ours.abort()
            theirs.abort()

    def test_many_threads(self):
        ours, theirs = self.pair()
        threads = [self.start(lambda n=n: [
            ours.send({'n': n, 'i': i, 'x': 'y' * (i * 997 % 40000)})
            for i in range(50)]) for n in range(6)]
        # And as many answers at the same time.
        back = self.start(lambda: [
            theirs.send({'i': i}) for i in range(300)])
        reader = self.start(lambda: [
            ours.recv(base.PATIENCE)['i'] for _ in range(300)])
        seen = [theirs.recv(base.PATIENCE) for _ in range(300)]
        for n in range(6):
            self.assertEqual(list(range(50)),
                             [f['i'] for f in seen if f['n'] == n])
        for thread, _ in (*threads, back, reader):
            thread.join()
        self.assertEqual([list(range(300))], reader[1])

    def test_a_time_out_loses_nothing(self):
        ours, theirs = self.pair()
        data = channel.encode({'x': 'y' * 100000})
        for part in (data[:2], data[2:50], data[50:70000]):
            ours.send_bytes(part)
            self.refused(theirs.recv, 0.05, code='timeout')
        ours.send_bytes(data[70000:])
        self.assertEqual({'x': 'y' * 100000}, theirs.recv(base.PATIENCE))
        self.refused(theirs.recv, 0, code='timeout')

    def test_what_has_arrived_needs_no_time(self):
        ours, theirs = self.pair()
        ours.send({})
        ours.close(0)
        self.assertEqual({}, theirs.recv(base.PATIENCE))
        self.assertIsNone(theirs.recv(base.PATIENCE))
        self.assertIsNone(theirs.recv(0))


class TestEnds(ConnectionTestCase):

    def test_in_order(self):
        ours, theirs = self.pair()
        ours.send({'last': True})
        thread, _ = self.start(ours.close)
        self.assertEqual({'last': True}, theirs.recv(base.PATIENCE))
        self.assertIsNone(theirs.recv(base.PATIENCE))
        theirs.close()
        thread.join()
        ours.close()
        self.assertTrue(ours.closed)
        self.refused(ours.send, {}, code='network')
        self.refused(ours.recv, 1, code='network')

    def test_the_last_frame_arrives_although_ours_are_unread(self):
        # A reset at the commit would make the source ask who runs.
        for _ in range(20):
            ours, theirs = self.pair()
            for _ in range(20):
                ours.send({'heartbeat': 'x' * 1000})
            theirs.send({'type': 'running'})
            thread, _ = self.start(theirs.close)
            ours.send({'heartbeat': 'x' * 1000})
            self.assertEqual({'type': 'running'}, ours.recv(base.PATIENCE))
            self.assertIsNone(ours.recv(base.PATIENCE))
            ours.close()
            thread.join()

    def test_cut_between_two_frames(self):
        ours, theirs = self.pair()
        ours.send({'x': 1})
        ours.abort()
        self.assertEqual({'x': 1}, theirs.recv(base.PATIENCE))
        # Not None: it did not say good-bye.
        error = self.refused(theirs.recv, base.PATIENCE, code='network')
        self.assertIn('without notice', str(error))
        self.refused(theirs.recv, base.PATIENCE, code='network')

    def test_cut_within_a_frame(self):
        for size in (1, 3, 4, 5, 9):
            ours, theirs = self.pair()
            ours.send_bytes(channel.encode({'x': 'yz'})[:size])
            ours.close(0)
            error = self.refused(theirs.recv, base.PATIENCE, code='network')
            self.assertIn('cut', str(error))
            theirs.abort()

    def test_cut_on_the_way(self):
        proxy, ours, theirs = self.through(lambda data, *_: data)
        ours.send({'x': 1})
        self.assertEqual({'x': 1}, theirs.recv(base.PATIENCE))
        proxy.cut()
        for side in (ours, theirs):
            self.refused(side.recv, base.PATIENCE, code='network')

    def test_changed_on_the_way(self):
        evil = threading.Event()

        def change(data, from_client, offset):
            if evil.is_set() and from_client:
                data = data[:-1] + bytes([data[-1] ^ 1])
            return data

        _, ours, theirs = self.through(change)
        ours.send({'x': 1})
        self.assertEqual({'x': 1}, theirs.recv(base.PATIENCE))
        evil.set()
        ours.send({'x': 2})
        error = self.refused(theirs.recv, base.PATIENCE, code='network')
        self.assertIn('decryption failed', str(error))
        # The other side hears of it.
        self.refused(ours.recv, base.PATIENCE, code='network')

    def test_repeated_on_the_way(self):
        evil = threading.Event()
        _, ours, theirs = self.through(
            lambda data, from_client, offset:
            data * 2 if evil.is_set() and from_client else data)
        evil.set()
        ours.send({'x': 1})
        self.assertEqual({'x': 1}, theirs.recv(base.PATIENCE))
        self.refused(theirs.recv, base.PATIENCE, code='network')

    def test_nothing_can_be_read_on_the_way(self):
        seen = []

        def change(data, *_):
            seen.append(data)
            return data

        _, ours, theirs = self.through(change)
        ours.send({'x': 'a secret of the guest'})
        theirs.recv(base.PATIENCE)
        wire = b''.join(seen)
        self.assertGreater(len(wire), 1000)
        for words in (b'secret', self.migration.encode(),
                      self.instance.encode(), b'host-a', b'host-b'):
            self.assertNotIn(words, wire)

    def test_abort_wakes_who_waits(self):
        ours, _ = self.pair()
        other, _ = self.pair()
        reader, read = self.start(ours.recv, base.PATIENCE)
        writer, written = self.start(
            other.send_bytes, bytes(1 << 26), base.PATIENCE)
        base.until(lambda: other.transport.wants_write, 'a full pipe')
        other.abort()
        ours.abort()
        reader.join()
        writer.join()
        self.assertEqual(['network', 'network'],
                         [read[0].code, written[0].code])

    def test_close_wakes_who_waits(self):
        ours, theirs = self.pair()
        reader, read = self.start(ours.recv, base.PATIENCE)
        ours.close(0.1)
        reader.join()
        self.assertEqual('network', read[0].code)

    def test_the_other_side_reads_nothing(self):
        ours, theirs = self.pair()
        self.refused(ours.send_bytes, bytes(1 << 26), 0.2, code='timeout')
        # A part was sent: nothing can follow it.
        self.refused(ours.send, {}, code='network')
        self.assertTrue(ours.closed)

    def test_close_waits_for_nobody_for_long(self):
        ours, theirs = self.pair()
        self.start(theirs.send_bytes, bytes(1 << 26), base.PATIENCE)
        ours.close(0.2)
        self.assertTrue(ours.closed)

    def test_one_way(self):
        ours, theirs = self.pair()
        theirs.send({'early': 'x' * 200000})
        # It has arrived, and was not asked for yet.
        base.until(lambda: not theirs.transport.wants_write, 'it')
        buffer = bytearray(1)
        ours.recv_exact(buffer)
        ours.end()
        self.assertIsNone(theirs.recv(base.PATIENCE))
        self.refused(ours.send, {}, code='network')
        for n in range(3):
            theirs.send({'n': n, 'x': 'y' * 300000})
        theirs.close(0)
        rest = bytearray(len(channel.encode({'early': 'x' * 200000})) - 1)
        ours.recv_exact(rest)
        self.assertEqual({'early': 'x' * 200000},
                         json.loads(rest[3:]))
        for n in range(3):
            self.assertEqual(n, ours.recv(base.PATIENCE)['n'])
        self.assertIsNone(ours.recv(base.PATIENCE))

    def test_a_host_that_vanishes_is_noticed(self):
        # That it is can only be seen with a cable to pull; here that both
        # sides ask the kernel for it.
        for role, seconds in (('control', 30), ('pages', 120)):
            for side in self.pair(role):
                with socket.socket(fileno=os.dup(side.fileno())) as sock:
                    def option(name, sock=sock):
                        return sock.getsockopt(socket.IPPROTO_TCP, name)

                    self.assertEqual(1, sock.getsockopt(
                        socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                    self.assertEqual(
                        seconds * 1000, option(socket.TCP_USER_TIMEOUT))
                    self.assertEqual(
                        seconds, option(socket.TCP_KEEPIDLE)
                        + option(socket.TCP_KEEPINTVL)
                        * option(socket.TCP_KEEPCNT))
                    self.assertEqual(1, option(socket.TCP_NODELAY))

    def test_with(self):
        ours, theirs = self.pair()
        self.start(theirs.recv, base.PATIENCE)
        with ours:
            pass
        self.assertTrue(ours.closed)


class TestBulk(ConnectionTestCase):

    def test_both_ways_at_once(self):
        ours, theirs = self.pair('images')
        data = [os.urandom(30 << 20), os.urandom(20 << 20)]
        got = [bytearray(len(d)) for d in data]
        threads = [
            self.start(ours.send_bytes, data[0], base.PATIENCE),
            self.start(theirs.send_bytes, data[1], base.PATIENCE),
            self.start(theirs.recv_exact, got[0], base.PATIENCE),
            self.start(ours.recv_exact, got[1], base.PATIENCE)]
        for thread, result in threads:
            thread.join()
            self.assertEqual([None], result)
        self.assertEqual(data, got)

    def test_views(self):
        ours, theirs = self.pair()
        ours.send_bytes(memoryview(bytes(8)).cast('I'))
        buffer = bytearray(8)
        theirs.recv_exact(memoryview(buffer).cast('I'))
        ours.send_bytes(b'')
        ours.send_bytes(b'x')
        self.assertEqual(1, theirs.recv_into(buffer, base.PATIENCE))
        self.assertEqual(b'x', buffer[:1])

    def test_less_than_was_to_come(self):
        ours, theirs = self.pair()
        ours.send_bytes(b'abc')
        ours.close(0)
        self.refused(theirs.recv_exact, bytearray(4), code='network')
        self.assertEqual(0, theirs.recv_into(bytearray(4), 1))

    def test_with_a_limit(self):
        ours, theirs = self.pair()
        slow = bandwidth.Bandwidth(1)
        thread, result = self.start(
            lambda: ours.send_bytes(bytes(1 << 20), base.PATIENCE, slow))
        # The first part goes; for the second one it would wait for days.
        theirs.recv_exact(bytearray(1 << 18))
        self.refused(theirs.recv_into, bytearray(1), 0.3, code='timeout')
        slow.rate = None
        theirs.recv_exact(bytearray((1 << 20) - (1 << 18)))
        thread.join()
        self.assertEqual([None], result)

    def test_abort_while_it_waits_for_the_limit(self):
        ours, theirs = self.pair()
        thread, result = self.start(
            lambda: ours.send_bytes(
                bytes(1 << 20), base.PATIENCE, bandwidth.Bandwidth(1)))
        theirs.recv_exact(bytearray(1 << 18))
        ours.abort()
        thread.join()
        self.assertEqual('network', result[0].code)


class TestConnect(base.ChannelTestCase):
    """The other side is not what it should be."""

    def dial_fake(self, serve, timeout=base.PATIENCE):
        server = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(server.close)

        def work():
            sock, _ = server.accept()
            with sock:
                sock.settimeout(base.PATIENCE)
                serve(sock)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            return self.dial(port=server.getsockname()[1], timeout=timeout)
        finally:
            thread.join()

    def fake_tls(self, answer):
        """A server with B's key that says something else."""
        context = self.b.context([keys.Peer(self.a.certificate)], server=True)

        def serve(sock):
            with context.wrap_socket(sock, server_side=True) as tls:
                length, = struct.unpack('>I', tls.recv(4))
                while length:
                    length -= len(tls.recv(length))
                tls.sendall(answer)
        return serve

    def frame(self, frame):
        body = json.dumps(frame).encode()
        return struct.pack('>I', len(body)) + body

    def test_nobody(self):
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        error = self.refused(self.dial, port=port, code='network')
        self.assertIn(str(port), str(error))

    def test_no_such_host(self):
        self.refused(
            channel.connect, 'no.such.host.invalid', 1, self.a,
            keys.Peer(self.b.certificate), self.hello(), base.PATIENCE,
            code='network')

    def test_silence(self):
        release = threading.Event()
        server = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(server.close)
        self.addCleanup(release.set)
        error = self.refused(self.dial, port=server.getsockname()[1],
                             timeout=0.3, code='timeout')
        self.assertIn('handshake', str(error))

    def test_a_full_queue(self):
        # The kernel does not even answer.
        server = socket.create_server(('127.0.0.1', 0), backlog=0)
        self.addCleanup(server.close)
        first = socket.create_connection(server.getsockname())
        self.addCleanup(first.close)
        error = self.refused(self.dial, port=server.getsockname()[1],
                             timeout=0.3, code='timeout')
        self.assertIn('connecting', str(error))

    def test_it_hangs_up(self):
        self.refused(self.dial_fake, lambda sock: None, code='network')

    def test_it_speaks_something_else(self):
        self.refused(self.dial_fake,
                     lambda sock: sock.sendall(b'SSH-2.0-x\r\n' * 100),
                     code='network')

    def test_it_hangs_up_after_the_hello(self):
        self.refused(self.dial_fake, self.fake_tls(b''), code='network')

    def test_another_version(self):
        error = self.refused(
            self.dial_fake, self.fake_tls(self.frame({'v': 9, 'ok': True})),
            code='unsupported')
        self.assertIn('speaks version 9', str(error))

    def test_an_oversized_answer(self):
        self.refused(self.dial_fake, self.fake_tls(b'\x7f' * 100),
                     code='invalid')

    def test_strange_answers(self):
        for frame in ({'v': 1}, {'v': 1, 'ok': 1}, {'v': 1, 'ok': False},
                      {'v': 1, 'ok': False, 'error': 'x'},
                      {'v': 1, 'ok': False, 'error': {'code': 'new'}}):
            self.refused(self.dial_fake, self.fake_tls(self.frame(frame)),
                         code='internal')

    def test_no_answer(self):
        release = threading.Event()

        def serve(sock):
            context = self.b.context(
                [keys.Peer(self.a.certificate)], server=True)
            with context.wrap_socket(sock, server_side=True):
                release.wait(base.PATIENCE)

        threading.Timer(1.0, release.set).start()
        self.refused(self.dial_fake, serve, 0.5, code='timeout')
