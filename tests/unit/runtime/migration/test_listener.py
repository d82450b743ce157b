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

"""Who is let in, and what the listener does for them."""

import json
import ssl
import struct
import threading
import uuid as uuidlib

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509

from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import keys
from nova_pycontainer.runtime.migration import listener
from tests.unit.runtime.migration import base


class TestWhoMayCome(base.ChannelTestCase):

    def test_all_roles(self):
        self.expect()
        for role in sorted(channel.ROLES):
            ours, theirs = self.pair(role)
            self.assertEqual(
                (self.migration, self.instance, role, self.seq),
                (theirs.hello.migration, theirs.hello.instance,
                 theirs.hello.role, theirs.hello.seq))
            self.assertEqual(self.b.fingerprint(), ours.fingerprint)
            self.assertEqual(self.a.fingerprint(), theirs.fingerprint)
            self.assertEqual('TLSv1.3', ours.transport.version())
            self.assertIn(role, repr(theirs))

    def test_nobody_is_expected(self):
        error = self.refused(self.dial)
        self.assertIn('does not accept', str(error))
        self.assertLogged('certificate refused')

    def test_another_host(self):
        self.expect()
        other = keys.Identity.load_or_create(self.dir / 'c', 'host-c')
        self.refused(self.dial, identity=other)
        self.assertStillServes()

    def test_another_host_of_the_same_name(self):
        self.expect()
        other = keys.Identity.load_or_create(self.dir / 'c', 'host-a')
        error = self.refused(self.dial, identity=other)
        self.assertIn('certificate', str(error))
        self.assertStillServes()

    def test_the_host_of_another_migration(self):
        self.expect()
        other = keys.Identity.load_or_create(self.dir / 'c', 'host-c')
        theirs = str(uuidlib.uuid4())
        self.expect(other.certificate, migration=theirs)
        error = self.refused(self.dial, identity=other)
        self.assertIn('not expected from this host', str(error))
        # It cannot tell that migration from one that does not exist.
        nothing = self.refused(
            self.dial, identity=other, migration=str(uuidlib.UUID(int=5)))
        self.assertEqual(
            error.message.replace(self.migration, str(uuidlib.UUID(int=5))),
            nothing.message)
        self.assertIsNone(error.cause)
        self.dial(identity=other, migration=theirs)
        self.assertStillServes()

    def test_a_certificate_that_the_announced_one_has_signed(self):
        # The key of A vouches for another one: pinned is pinned.
        self.expect()
        signed = self._signed_by_a()
        self.refused(self.dial, identity=signed)

    def _signed_by_a(self):
        data = (self.dir / 'a' / keys.FILE).read_bytes()
        key = serialization.load_pem_private_key(data, None)
        issuer = x509.load_pem_x509_certificate(data)
        mine = ec.generate_private_key(ec.SECP256R1())
        leaf = (x509.CertificateBuilder()
                .subject_name(x509.Name([])).issuer_name(issuer.subject)
                .public_key(mine.public_key()).serial_number(5)
                .not_valid_before(issuer.not_valid_before_utc)
                .not_valid_after(issuer.not_valid_after_utc)
                .sign(key, hashes.SHA256()))
        pem = serialization.Encoding.PEM
        chain = (mine.private_bytes(
            pem, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()) + leaf.public_bytes(pem)
            + issuer.public_bytes(pem))
        return keys.Identity(leaf.public_bytes(pem).decode(), chain)

    def test_not_the_announced_server(self):
        self.expect()
        error = self.refused(
            self.dial, peer=keys.Peer(self.a.certificate))
        self.assertIn('not the host that was announced', str(error))
        self.assertStillServes()

    def test_nothing_announced_of_the_server(self):
        self.expect()
        self.refused(self.dial, peer=keys.Peer(names=('127.0.0.1',)))

    def test_no_certificate(self):
        self.expect()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(cadata=self.b.certificate)
        sock = context.wrap_socket(self.tcp())
        self.addCleanup(sock.close)
        self.assertEnds(sock)
        self.assertLogged('peer did not return a certificate')
        self.assertStillServes()

    def test_another_instance_role_or_migration(self):
        self.expect(roles=['control', 'upper'])
        for change in ({'instance': str(uuidlib.uuid4())},
                       {'role': 'pages'},
                       {'migration': str(uuidlib.uuid4())}):
            self.refused(self.dial, **change)
        self.assertStillServes()

    def test_replay(self):
        self.expect()
        self.dial('upper', seq=1)
        error = self.refused(self.dial, 'upper', seq=1)
        self.assertIn('has been before', str(error))
        self.dial('images', seq=1)
        self.dial('upper', seq=2)

    def test_forgotten(self):
        self.expect()
        ours, theirs = self.pair()
        self.listener.forget(self.migration)
        self.listener.forget(self.migration)
        self.refused(self.dial)
        # Those that are there stay.
        ours.send({})
        self.assertEqual({}, theirs.recv(base.PATIENCE))
        # And it may be expected anew, such as after a restart.
        self.expect()
        self.dial(seq=0)

    def test_expired(self):
        self.expect(expires_s=-1)
        self.refused(self.dial)
        self.refused(self.listener.extend, self.migration, 10,
                     code='not_found')
        self.expect()
        self.listener.extend(self.migration, -1)
        self.refused(self.dial)
        self.expect()
        self.listener.extend(self.migration, 3600)
        self.assertStillServes()

    def test_it_expires_between_handshake_and_hello(self):
        self.expect()
        sock = self.tls()
        self.listener.extend(self.migration, -1)
        sock.sendall(channel.encode(self.hello().to_frame()))
        length, = struct.unpack('>I', sock.recv(4))
        answer = json.loads(sock.recv(length))
        self.assertIs(False, answer['ok'])
        self.assertEqual('forbidden', answer['error']['code'])

    def test_expected_twice(self):
        self.expect()
        self.refused(self.expect, code='exists')

    def test_impossible_expectations(self):
        self.refused(self.expect, roles=['other'], code='invalid')
        self.refused(self.expect, certificate='x', code='invalid')
        self.refused(self.dial)

    def test_a_new_key(self):
        self.expect()
        ours, theirs = self.pair()
        old, self.b = self.b, self.b.rotate()
        self.listener.set_identity(self.b)
        self.refused(self.dial, peer=keys.Peer(old.certificate))
        self.assertStillServes()
        ours.send({})
        self.assertEqual({}, theirs.recv(base.PATIENCE))

    def test_a_new_key_of_the_dialling_side(self):
        self.expect()
        self.a = self.a.rotate()
        self.refused(self.dial)
        self.listener.forget(self.migration)
        self.expect()
        self.assertStillServes()

    def test_one_expired_certificate_does_not_matter_to_the_others(self):
        self.expect()
        self.expect(keys.Identity.load_or_create(
            self.dir / 'c', 'host-c').certificate,
            migration=str(uuidlib.uuid4()))
        self.assertStillServes()


class TestListener(base.ChannelTestCase):

    def test_ports(self):
        taken = self.listener.port
        second = listener.Listener(
            '127.0.0.1', (taken, taken + 20), self.b, self.accepted.put)
        self.addCleanup(second.close)
        self.assertTrue(taken < second.port <= taken + 20)
        error = self.refused(
            listener.Listener, '127.0.0.1', (taken, taken), self.b,
            self.accepted.put, code='network')
        self.assertIn(str(taken), str(error))
        self.refused(
            listener.Listener, '192.0.2.1', (0, 0), self.b,
            self.accepted.put, code='network')
        self.refused(
            listener.Listener, 'no.such.host.invalid', (0, 0), self.b,
            self.accepted.put, code='network')

    def test_a_port_is_free_again_at_once(self):
        self.expect()
        ours, theirs = self.pair()
        port = self.listener.port
        self.listener.close()
        self.listener.close()
        theirs.close()
        again = listener.Listener(
            '127.0.0.1', (port, port), self.b, self.accepted.put)
        self.addCleanup(again.close)
        self.assertEqual(port, again.port)

    def test_connections_outlive_it(self):
        self.expect()
        ours, theirs = self.pair()
        stranger = self.tcp()
        self.listener.close()
        self.assertEnds(stranger)
        ours.send({'x': 1})
        self.assertEqual({'x': 1}, theirs.recv(base.PATIENCE))
        self.refused(self.dial, code='network')

    def test_ipv6(self):
        both = listener.Listener('::', (0, 0), self.b, self.accepted.put)
        self.addCleanup(both.close)
        both.expect(self.migration, self.instance,
                    keys.Peer(self.a.certificate), channel.ROLES, 3600)
        self.dial(port=both.port)
        theirs = self.accepted.get(timeout=base.PATIENCE)
        self.addCleanup(theirs.abort)
        self.assertRegex(theirs.remote, r'^127\.0\.0\.1:\d+$')
        ours = channel.connect(
            '::1', both.port, self.a, keys.Peer(self.b.certificate),
            self.hello(), base.PATIENCE)
        self.addCleanup(ours.abort)
        self.assertEqual(f'[::1]:{both.port}', ours.remote)
        self.accepted.get(timeout=base.PATIENCE).abort()

    def test_whoever_takes_connections_fails(self):
        def fail(connection):
            raise ValueError('broken')

        self.listener = self.listen(on_connection=fail)
        self.expect()
        ours = self.dial()
        self.refused(ours.recv, base.PATIENCE, code='network')
        self.assertLogged('broken')
        self.dial().abort()

    def test_one_that_is_slow_keeps_nobody_waiting(self):
        release = threading.Event()
        self.addCleanup(release.set)
        taken = []

        def wait(connection):
            taken.append(connection)
            release.wait(base.PATIENCE)
            connection.abort()

        self.listener = self.listen(on_connection=wait)
        self.expect()
        for _ in range(10):
            self.dial()
        base.until(lambda: len(taken) == 10, 'all')
        release.set()

    def test_a_thousand(self):
        """One after the other, then many at once; nothing is left."""
        def echo(connection):
            with connection:
                while (frame := connection.recv(base.PATIENCE)) is not None:
                    connection.send(frame)

        self.listener = self.listen(on_connection=echo)
        self.expect()
        wrong = []

        def work(first):
            try:
                for seq in range(first, 1000, 8):
                    with channel.connect(
                            '127.0.0.1', self.listener.port, self.a,
                            keys.Peer(self.b.certificate),
                            self.hello('control', seq=seq),
                            base.PATIENCE) as ours:
                        ours.send({'seq': seq})
                        if ours.recv(base.PATIENCE) != {'seq': seq}:
                            raise AssertionError(seq)
            except Exception as e:
                wrong.append(e)

        workers = [threading.Thread(target=work, args=(n,))
                   for n in range(8)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.assertEqual([], wrong)
        self.assertEqual('', self.log.output)
