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

import concurrent.futures
import datetime
import ipaddress
import os
import pathlib
import stat
import tempfile
from unittest import mock

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509
from cryptography.x509 import oid
import fixtures
import testtools

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import keys
from tests.unit.runtime.migration import base

_PEM = serialization.Encoding.PEM


class KeysTestCase(testtools.TestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory(prefix='pyc-keys-')
        self.addCleanup(directory.cleanup)
        self.dir = pathlib.Path(directory.name)
        self.file = self.dir / 'keys' / 'host.pem'

    def load(self, hostname='host-a.example'):
        return keys.Identity.load_or_create(self.dir / 'keys', hostname)

    def refused(self, code, call, *args):
        error = self.assertRaises(errors.ContainerError, call, *args)
        self.assertEqual(code, error.code, str(error))
        return error


class TestOwnKey(KeysTestCase):

    def test_the_first_start_makes_one_that_is_kept(self):
        first = self.load()
        self.assertEqual(first.certificate, self.load().certificate)
        self.assertRegex(first.fingerprint(), '^[0-9a-f]{64}$')
        self.assertEqual(['host.pem'], os.listdir(self.dir / 'keys'))

    def test_nobody_else_can_reach_it(self):
        old = os.umask(0)
        self.addCleanup(os.umask, old)
        self.load()
        self.assertEqual(0o700, stat.S_IMODE(
            os.stat(self.file.parent).st_mode))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.file).st_mode))

    def test_the_certificate(self):
        identity = self.load()
        # It travels in every compute node's record.
        self.assertLess(len(identity.certificate), 1024)
        self.assertNotIn('PRIVATE', identity.certificate)
        self.assertNotIn('PRIVATE', repr(identity))
        certificate = x509.load_pem_x509_certificate(
            identity.certificate.encode())
        self.assertEqual(certificate.subject, certificate.issuer)
        extensions = certificate.extensions
        self.assertFalse(extensions.get_extension_for_class(
            x509.BasicConstraints).value.ca)
        self.assertEqual(
            ['host-a.example'],
            extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            ).value.get_values_for_type(x509.DNSName))
        life = (certificate.not_valid_after_utc
                - datetime.datetime.now(datetime.UTC))
        self.assertGreater(life, datetime.timedelta(days=19 * 365))

    def test_an_address_as_the_host_name(self):
        identity = self.load('2001:db8::1')
        names = x509.load_pem_x509_certificate(
            identity.certificate.encode()).extensions.get_extension_for_class(
                x509.SubjectAlternativeName).value
        self.assertEqual([ipaddress.ip_address('2001:db8::1')],
                         names.get_values_for_type(x509.IPAddress))

    def test_long_and_impossible_host_names(self):
        name = '.'.join(['a' * 60] * 4)
        self.assertLess(len(self.load(name).certificate), 2048)
        self.file.unlink()
        error = self.refused('invalid', self.load, 'hôst')
        self.assertIn('hôst', str(error))
        self.refused('invalid', self.load, '')
        self.assertFalse(self.file.exists())

    def test_two_hosts_of_one_name_differ(self):
        first = self.load()
        self.file.unlink()
        self.assertNotEqual(first.fingerprint(), self.load().fingerprint())

    def test_many_at_once_get_the_same(self):
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda _: self.load(), range(32)))
        self.assertEqual(1, len({i.certificate for i in found}))
        self.assertEqual(['host.pem'], os.listdir(self.dir / 'keys'))

    def test_rotate(self):
        first = self.load()
        second = first.rotate()
        self.assertNotEqual(first.fingerprint(), second.fingerprint())
        self.assertEqual(second.certificate, self.load().certificate)
        self.assertEqual(['host.pem'], os.listdir(self.dir / 'keys'))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(self.file).st_mode))


class TestRefusedKey(KeysTestCase):

    def test_modes(self):
        self.load()
        for mode in (0o640, 0o604, 0o620, 0o602):
            self.file.chmod(mode)
            error = self.refused('forbidden', self.load)
            self.assertIn(f'{mode:04o}', str(error))
            self.assertIn('chmod go=', str(error))
        self.file.chmod(0o600)
        for mode in (0o750, 0o705, 0o770):
            self.file.parent.chmod(mode)
            self.refused('forbidden', self.load)
            self.refused('forbidden', lambda: keys.Identity(
                '', b'', None, self.file.parent, 'x').rotate())
        self.file.parent.chmod(0o700)
        self.load()

    def test_another_owner(self):
        self.load()
        if os.geteuid():
            # It is ours, and we are another user.
            uid = os.geteuid() + 1
            self.useFixture(fixtures.MonkeyPatch(
                'os.geteuid', lambda: uid))
        else:
            os.chown(self.file, 12345, -1)
        self.refused('forbidden', self.load)

    def test_a_link(self):
        self.load()
        os.rename(self.file, self.dir / 'elsewhere.pem')
        os.symlink(self.dir / 'elsewhere.pem', self.file)
        self.refused('invalid', self.load)

    def test_not_a_file_not_a_directory(self):
        self.file.parent.mkdir(mode=0o700)
        os.mkfifo(self.file, 0o600)
        self.refused('invalid', self.load)
        self.file.unlink()
        self.file.parent.rmdir()
        self.file.parent.write_text('')
        self.refused('invalid', self.load)

    def test_damage(self):
        self.load()
        data = self.file.read_bytes()
        other = keys.Identity.load_or_create(self.dir / 'other', 'other')
        half = data[:data.index(b'-----BEGIN CERT')]
        for damaged in (b'', b'x' * 100, data[:200], half,
                        half + other.certificate.encode(),
                        data[len(half):], b'y' * (1 << 20)):
            self.file.write_bytes(damaged)
            self.refused('invalid', self.load)
        self.file.write_bytes(data)
        self.load()

    def test_expired(self):
        with mock.patch.object(
                keys, 'VALIDITY', datetime.timedelta(hours=-1)):
            error = self.refused('invalid', self.load)
        self.assertIn('valid from', str(error))
        self.assertIn('clock', str(error))


class TestPeer(KeysTestCase):

    def test_what_is_announced_is_checked(self):
        pem = self.load().certificate
        self.assertIsNotNone(keys.Peer(pem).pin())
        self.assertIsNone(keys.Peer().pin())
        for bad in ('', 'x', pem + pem, pem[:100], pem * 200, 'ü' + pem, 7,
                    pem.replace('M', 'N')):
            self.refused('invalid', keys.Peer(bad).pin)

    def test_nothing_announced(self):
        identity = self.load()
        der = keys.Peer(identity.certificate).pin()
        self.assertIsNone(identity.check(der, keys.Peer(
            identity.certificate)))
        self.assertIsNotNone(identity.check(der, keys.Peer()))
        self.assertIsNotNone(identity.check(None, keys.Peer(
            identity.certificate)))
        self.assertIsNotNone(identity.check(b'', keys.Peer(
            identity.certificate)))


class Authority:
    """An operator's CA with an intermediate one."""

    def __init__(self, directory, name='operator'):
        self.dir = directory / name
        self.dir.mkdir()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = self.sign(f'{name} root', self.key.public_key(), self.key,
                              None, ca=True)
        self.sub_key = ec.generate_private_key(ec.SECP256R1())
        self.sub = self.sign(f'{name} sub', self.sub_key.public_key(),
                             self.key, self.root, ca=True)
        self.ca = self.dir / 'ca.pem'
        self.ca.write_bytes(self.root.public_bytes(_PEM))

    @staticmethod
    def sign(name, public, key, issuer, *, ca=False, names=(), usage=None,
             days=30):
        now = datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(
            oid.NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject if issuer else subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=60))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca, None), critical=True))
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(names), critical=False)
        if usage:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage(usage), critical=False)
        return builder.sign(key, hashes.SHA256())

    def issue(self, name, *, names=None, usage=None, days=30,
              password=None, chain=True, ca=None):
        """What the three options of a host say."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name)] if names is None else names
        leaf = self.sign(name, key.public_key(), self.sub_key, self.sub,
                         names=names, usage=usage, days=days)
        cert, secret = self.dir / f'{name}.crt', self.dir / f'{name}.key'
        cert.write_bytes(leaf.public_bytes(_PEM) + (
            self.sub.public_bytes(_PEM) if chain else b''))
        secret.write_bytes(key.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password) if password
            else serialization.NoEncryption()))
        secret.chmod(0o640)
        return ca or self.ca, cert, secret


class TestOperator(KeysTestCase):

    def setUp(self):
        super().setUp()
        self.authority = Authority(self.dir)

    def operator(self, *args, **kwargs):
        return keys.Identity.load_operator(
            *self.authority.issue(*args, **kwargs))

    def test_loads(self):
        identity = self.operator('host-a')
        self.assertEqual(
            1, identity.certificate.count('BEGIN CERTIFICATE'))
        self.refused('unsupported', identity.rotate)

    def test_modes(self):
        paths = self.authority.issue('host-a')
        for mode in (0o644, 0o660):
            paths[2].chmod(mode)
            self.refused('forbidden', keys.Identity.load_operator, *paths)

    def test_a_password_is_not_asked_for(self):
        paths = self.authority.issue('host-a', password=b'secret')
        self.refused('invalid', keys.Identity.load_operator, *paths)

    def test_what_the_other_hosts_would_refuse(self):
        other = Authority(self.dir, 'other')
        server_only = [oid.ExtendedKeyUsageOID.SERVER_AUTH]
        client_only = [oid.ExtendedKeyUsageOID.CLIENT_AUTH]
        for kwargs in ({'ca': other.ca}, {'chain': False}, {'days': -1},
                       {'usage': server_only}, {'usage': client_only},
                       {'names': []}):
            error = self.assertRaises(
                errors.ContainerError, self.operator, 'host-a', **kwargs)
            self.assertEqual('invalid', error.code, kwargs)
            self.assertIsNotNone(error.remedy)
        self.operator('host-a', usage=server_only + client_only)

    def test_missing_files(self):
        ca, cert, key = self.authority.issue('host-a')
        nowhere = self.dir / 'nowhere'
        for paths in ((nowhere, cert, key), (ca, nowhere, key),
                      (ca, cert, nowhere), (key, cert, key)):
            self.refused('invalid', keys.Identity.load_operator, *paths)

    def test_names(self):
        identity = self.operator('host-a')
        other = self.operator('host-b', names=[
            x509.DNSName('Host-B.example'),
            x509.IPAddress(ipaddress.ip_address('192.0.2.7')),
            x509.DNSName('*.wild.example')])
        der = keys.Peer(other.certificate).pin()
        for good in ('host-b.EXAMPLE', 'host-b.example.', '192.0.2.7'):
            self.assertIsNone(identity.check(
                der, keys.Peer(names=('other', good))), good)
        for bad in ('host-b', '192.0.2.70', 'x.wild.example', ''):
            self.assertIsNotNone(identity.check(
                der, keys.Peer(names=(bad,))), bad)
        self.assertIsNotNone(identity.check(der, keys.Peer()))
        # Announced as well: then it has to be this one.
        names = ('192.0.2.7',)
        self.assertIsNone(identity.check(
            der, keys.Peer(other.certificate, names)))
        self.assertIn('announced', identity.check(
            der, keys.Peer(identity.certificate, names)))


class TestOperatorConnections(base.ChannelTestCase):

    def setUp(self):
        super().setUp()
        self.authority = Authority(self.dir)
        self.b = keys.Identity.load_operator(*self.authority.issue('host-b'))
        self.listener.set_identity(self.b)
        self.operator_a = keys.Identity.load_operator(
            *self.authority.issue('host-a'))
        self.peer = keys.Peer(names=('host-b', '127.0.0.1'))

    def test_both_of_the_ca(self):
        self.expect(peer=keys.Peer(names=('host-a',)))
        ours, theirs = self.pair(identity=self.operator_a, peer=self.peer)
        ours.send({'x': 1})
        self.assertEqual({'x': 1}, theirs.recv(base.PATIENCE))
        self.assertEqual(self.operator_a.fingerprint(), theirs.fingerprint)

    def test_another_host_of_the_ca(self):
        self.expect(peer=keys.Peer(names=('host-a',)))
        other = keys.Identity.load_operator(*self.authority.issue('host-c'))
        error = self.refused(self.dial, identity=other, peer=self.peer)
        self.assertIn('not expected', str(error))

    def test_the_server_is_another_host_of_the_ca(self):
        self.expect(peer=keys.Peer(names=('host-a',)))
        error = self.refused(self.dial, identity=self.operator_a,
                             peer=keys.Peer(names=('host-c',)))
        self.assertIn('host-b', str(error))

    def test_a_certificate_of_another_ca(self):
        self.expect(peer=keys.Peer(names=('host-a',)))
        other = Authority(self.dir, 'other')
        identity = keys.Identity.load_operator(*other.issue('host-a'))
        self.refused(self.dial, identity=identity, peer=self.peer)

    def test_only_one_has_the_ca(self):
        # A pins what B has announced, B wants one of the CA's.
        self.expect(peer=keys.Peer(self.a.certificate, ('host-a',)))
        error = self.refused(self.dial)
        self.assertIn('does not accept', str(error))
