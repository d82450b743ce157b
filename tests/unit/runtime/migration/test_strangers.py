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

"""What those can do who may not come, or do not know how to."""

import json
import os
import resource
import socket
import ssl
import struct
import time

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import listener
from tests.unit.runtime.migration import base


class TestBadHellos(base.ChannelTestCase):
    """By a host that is expected, and has gone mad."""

    def setUp(self):
        super().setUp()
        self.expect()
        self.sock = self.tls()

    def answer(self):
        stream = self.sock.makefile('rb')
        self.addCleanup(stream.close)
        length, = struct.unpack('>I', stream.read(4))
        answer = json.loads(stream.read(length))
        self.assertEqual(1, answer['v'])
        self.assertIs(False, answer['ok'])
        self.assertEqual(b'', stream.read())
        return errors.ContainerError.from_dict(answer['error'])

    def say(self, frame):
        body = frame if isinstance(frame, bytes) else json.dumps(
            frame).encode()
        self.sock.sendall(struct.pack('>I', len(body)) + body)
        return self.answer()

    def leave(self):
        """Say good-bye, and wait for the other side to hang up."""
        self.assertRaises(ssl.SSLError, self.sock.unwrap)

    def change(self, **kwargs):
        return self.say(self.hello().to_frame() | kwargs)

    def test_version(self):
        error = self.change(v=2)
        self.assertEqual('unsupported', error.code)
        self.assertIn('speaks version 2', str(error))
        self.assertLogged('speaks version 2')

    def test_no_version(self):
        self.assertEqual('unsupported', self.say({}).code)

    def test_role(self):
        self.assertIn('role', str(self.change(role='other')))

    def test_role_of_another_kind(self):
        self.assertEqual('invalid', self.change(role=['control']).code)

    def test_uuids(self):
        self.assertEqual('invalid', self.change(migration='../x').code)

    def test_uuids_of_another_kind(self):
        self.assertEqual('invalid', self.change(instance={'a': 1}).code)

    def test_long_values(self):
        error = self.change(instance='\ud800' * 500)
        self.assertEqual('invalid', error.code)
        self.assertLess(len(str(error)), 300)

    def test_negative_number(self):
        self.assertEqual('invalid', self.change(seq=-1).code)

    def test_no_number(self):
        self.assertEqual('invalid', self.change(seq=True).code)

    def test_another_field(self):
        self.assertEqual('invalid', self.change(other=1).code)

    def test_missing_field(self):
        self.assertEqual('invalid', self.say({'v': 1}).code)

    def test_not_an_object(self):
        self.assertEqual('invalid', self.say([1]).code)

    def test_not_json(self):
        self.assertEqual('invalid', self.say(b'\xff' * 100).code)

    def test_nested(self):
        self.assertEqual('invalid', self.say(b'[' * 4000).code)

    def test_oversized(self):
        self.sock.sendall(struct.pack('>I', 4097) + b'x' * 4097)
        self.assertIn('4097', str(self.answer()))

    def test_gigantic(self):
        self.sock.sendall(b'\xff' * 4)
        self.assertIn('4294967295', str(self.answer()))

    def test_empty(self):
        self.sock.sendall(b'\0' * 4)
        self.assertEqual('invalid', self.answer().code)

    def test_truncated(self):
        frame = channel.encode(self.hello().to_frame())
        self.sock.sendall(frame[:-1])
        self.sock.close()
        self.assertLogged('closed it without notice')

    def test_truncated_in_order(self):
        frame = channel.encode(self.hello().to_frame())
        self.sock.sendall(frame[:-1])
        self.leave()
        self.assertLogged('a frame of the other host is cut')

    def test_none(self):
        self.leave()
        self.assertLogged('it left without a hello')

    def test_byte_by_byte(self):
        for byte in channel.encode(self.hello().to_frame()):
            self.sock.sendall(bytes([byte]))
        self.assertIsNotNone(self.accepted.get(timeout=base.PATIENCE))

    def test_data_right_behind_it(self):
        """Nobody knows yet what to do with it."""
        self.sock.sendall(channel.encode(self.hello().to_frame())
                          + channel.encode({'x': 1}))
        self.assertEqual('invalid', self.answer().code)

    def test_twice(self):
        self.sock.sendall(2 * channel.encode(self.hello().to_frame()))
        self.assertIn('more than its hello', str(self.answer()))

    def tearDown(self):
        super().tearDown()
        self.sock.close()


class TestStrangers(base.ChannelTestCase):
    """Whoever can reach the port."""

    def setUp(self):
        super().setUp()
        self.expect()

    def test_tls_1_2(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=self.b.certificate)
        sock = self.tcp()
        self.assertRaises(ssl.SSLError, context.wrap_socket, sock)
        self.assertLogged('unsupported protocol')
        self.assertStillServes()

    def test_plain_text(self):
        for words in (b'GET / HTTP/1.1\r\n\r\n', b'\n' * 100,
                      channel.encode(self.hello().to_frame())):
            sock = self.tcp()
            sock.sendall(words)
            self.assertEnds(sock)
        self.assertStillServes()

    def test_garbage(self):
        for size in (1, 5, 100, 1 << 20):
            sock = self.tcp()
            try:
                sock.sendall(b'\x16\x03\x01' + os.urandom(size))
                sock.shutdown(socket.SHUT_WR)
            except ConnectionError:
                pass
            self.assertEnds(sock)
        self.assertStillServes()

    def test_a_hello_that_is_cut_anywhere(self):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self.a.context([keys.Peer(self.b.certificate)], server=False
                             ).wrap_bio(incoming, outgoing)
        self.assertRaises(ssl.SSLWantReadError, tls.do_handshake)
        flight = outgoing.read()
        for size in range(0, len(flight), 20):
            sock = self.tcp()
            sock.sendall(flight[:size])
            if size % 40:
                # A reset instead of an end.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                struct.pack('ii', 1, 0))
            sock.close()
        self.assertStillServes()

    def test_a_handshake_that_is_cut_anywhere(self):
        # Also within the second flight, and the hello behind it.
        sizes = []

        def count(data, from_client, offset):
            if from_client:
                sizes.append(offset + len(data))
            return data

        def through(change):
            proxy = base.Proxy(self.listener.port, change)
            try:
                return self.dial(port=proxy.port)
            finally:
                proxy.close()

        through(count).abort()
        total = max(sizes)
        self.assertGreater(total, 800)
        for limit in range(50, total - 1, 150):
            def cut(data, from_client, offset, limit=limit):
                if from_client and offset + len(data) > limit:
                    return None
                return data

            self.refused(through, cut, code='network')
        self.assertStillServes()

    def test_many_that_come_and_go(self):
        for _ in range(300):
            socket.create_connection(
                ('127.0.0.1', self.listener.port)).close()
        self.assertStillServes()
        base.until(lambda: not self.listener._strangers, 'an empty hall')
        # A port scan does not fill the log.
        self.assertLess(self.log.output.count('Refused the'), 60)

    def test_too_many_of_one_address(self):
        socks = [self.tcp() for _ in range(
            listener.MAX_STRANGERS_PER_ADDRESS)]
        base.until(lambda: len(self.listener._strangers) == len(socks),
                   'a full hall')
        self.assertEnds(self.tcp())
        self.assertLogged('too many are waiting')
        self.refused(self.dial, code='network')
        # Another address has its own places.
        other = socket.create_connection(
            ('127.0.0.1', self.listener.port),
            source_address=('127.0.0.2', 0))
        self.addCleanup(other.close)
        base.until(lambda: len(self.listener._strangers) == len(socks) + 1,
                   'one of another address')
        for sock in socks:
            sock.close()
        base.until(lambda: len(self.listener._strangers) == 1, 'room')
        self.assertStillServes()

    def test_no_descriptors_are_left(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(
            resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        sock = self.tcp()
        base.until(lambda: self.listener._strangers, 'one')
        late = socket.socket()
        self.addCleanup(late.close)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        late.connect(('127.0.0.1', self.listener.port))
        self.assertLogged('it cannot be accepted')
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        sock.close()
        self.assertStillServes()


class TestSlowStrangers(base.ChannelTestCase):

    #: For the good ones among them, too, on any machine.
    HELLO_TIMEOUT = 3.0

    def setUp(self):
        super().setUp()
        self.expect()

    def test_silence_before_the_handshake(self):
        socks = [self.tcp() for _ in range(30)]
        # They keep nobody waiting.
        self.assertStillServes()
        for sock in socks:
            self.assertEnds(sock)
        self.assertLogged('it said nothing in time')

    def test_silence_after_the_handshake(self):
        sock = self.tls()
        self.assertEnds(sock)
        self.assertLogged('it said nothing in time')
        self.assertStillServes()

    def test_drop_by_drop(self):
        frame = channel.encode(self.hello().to_frame())
        sock = self.tls()
        try:
            for byte in frame[:-1] * 100:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass
        else:
            self.fail('it had all the time it wanted')
        self.assertStillServes()

    def test_it_reads_nothing_after_a_refusal(self):
        sock = self.tls()
        sock.sendall(b'\xff' * 100)
        self.assertLogged('a frame of')
        base.until(lambda: not self.listener._strangers, 'its end')
        self.assertStillServes()
