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

"""Images that are signed, and servers that only run on those.

The signatures and certificates are real, and so is their verification: that
of Nova's image service, by cursive. What Nova's fixtures stand for here is
Glance's API and the store of the certificates.
"""

import base64
import datetime
import functools

from castellan.common.objects import x_509
from castellan.tests.unit.key_manager import mock_key_manager
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509
from nova.image import glance
from oslo_utils import uuidutils

from tests.functional import agents
from tests.functional import base
from tests.functional import migration_base


class KeyManager(mock_key_manager.MockKeyManager):
    """One store for all of the process's clients, as Barbican is."""

    stored = {}

    def __init__(self, configuration=None):
        super().__init__(configuration)
        self.keys = self.stored


class _Answer:
    """A body as glanceclient returns it."""

    def __init__(self, data):
        self.wrapped = data

    def __iter__(self):
        for start in range(0, len(self.wrapped), 1 << 16):
            yield self.wrapped[start:start + (1 << 16)]


class ImageService(glance.GlanceImageServiceV2):
    """Nova's own, with the data of its fixture."""

    def __init__(self, fixture):
        super().__init__(self)
        self._fixture = fixture
        self.downloads = 0

    def call(self, context, version, method, args):
        assert method == 'data'
        self.downloads += 1
        return _Answer(self._fixture._imagedata[args[0]])

    def show(self, context, image_id, **kwargs):
        return self._fixture.show(context, image_id)


class Signer:
    """A key with its certificate, in the store.

    :param issuer: the Signer that vouches for it; None: itself
    """

    def __init__(self, name, issuer=None):
        self._key = rsa.generate_private_key(65537, 2048)
        self._name = x509.Name(
            [x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = issuer or self
        now = datetime.datetime.now(datetime.UTC)
        certificate = x509.CertificateBuilder(
            issuer._name, self._name, self._key.public_key(),
            x509.random_serial_number(), now - datetime.timedelta(days=1),
            now + datetime.timedelta(days=1),
        ).add_extension(
            x509.BasicConstraints(ca=issuer is self, path_length=None), True,
        ).add_extension(x509.KeyUsage(
            digital_signature=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=issuer is self,
            crl_sign=False, encipher_only=False, decipher_only=False), True,
        ).sign(issuer._key, hashes.SHA256())
        self.id = uuidutils.generate_uuid()
        KeyManager.stored[self.id] = x_509.X509(
            certificate.public_bytes(serialization.Encoding.DER))

    def sign(self, data):
        """The properties of an image that has a signature."""
        signature = self._key.sign(
            data, padding.PSS(padding.MGF1(hashes.SHA256()),
                              padding.PSS.MAX_LENGTH), hashes.SHA256())
        return {
            'img_signature': base64.b64encode(signature).decode(),
            'img_signature_hash_method': 'SHA-256',
            'img_signature_key_type': 'RSA-PSS',
            'img_signature_certificate_uuid': self.id}


class TrustedImagesTest(migration_base.TestCase):

    def setUp(self):
        super().setUp()
        self.addCleanup(KeyManager.stored.clear)
        # Nova's fixture has set one that knows one key only.
        self.flags(group='key_manager',
                   backend=f'{__name__}.{KeyManager.__name__}')
        self.service = ImageService(self.glance)
        self.glance.download = self.service.download
        self.authority = Signer('authority')
        self.signer = Signer('signer', self.authority)
        self.data = self.image_data()
        self.signed = self.make_image(
            self.data, properties=self.signer.sign(self.data))
        self.forged = self.make_image(
            self.data, properties=self.signer.sign(self.data + b'\0'))

    def trusting(self, *signers, **values):
        return self.boot(trusted_image_certificates=[
            signer.id for signer in signers], **values)

    def refused(self, *signers, **values):
        """What is said of a server that must not come to be."""
        server = self.trusting(*signers, status='ERROR', **values)
        message = server['fault']['message']
        self.assertNotIn('Traceback', message)
        self.assert_nothing_left()
        self.delete(server)
        return message

    def test_signed_by_who_is_trusted(self):
        server = self.trusting(
            self.authority, self.signer, image=self.signed)
        self.assertEqual('running', self.info(server)['state'])
        self.assertEqual([self.authority.id, self.signer.id],
                         server['trusted_image_certificates'])
        self.assertEqual(1, self.service.downloads)
        # Verified once; the layer is shared.
        self.trusting(self.authority, self.signer, image=self.signed)
        self.assertEqual(1, self.service.downloads)

    def test_signature_of_other_data(self):
        message = self.refused(self.authority, image=self.forged)
        self.assertIn('signature does not match', message)
        self.assertEqual([], self.agents.client('host1').layer_list())

    def test_signed_by_who_is_not_trusted(self):
        stranger = Signer('stranger')
        message = self.refused(stranger, image=self.signed)
        self.assertIn('certificate validation failed', message)
        self.assertEqual(0, self.service.downloads)
        self.assertEqual([], self.agents.client('host1').layer_list())

    def test_not_signed(self):
        message = self.refused(self.authority)
        self.assertIn('img_signature', message)

    def test_layer_that_nobody_has_verified(self):
        """All three images have the same data, and so the same layer."""
        self.boot()
        self.refused_beside_one(self.forged, 'signature does not match')
        self.refused_beside_one(self.image, 'img_signature')
        self.assertEqual(2, self.service.downloads)
        server = self.trusting(self.authority, image=self.signed)
        self.assertEqual(3, self.service.downloads)
        self.assertEqual(1, self.agents.imports('host1'))
        # A new nova-compute knows of no verification.
        self.restart()
        self.api.post_server_action(server['id'], {'rebuild': {
            'imageRef': self.signed,
            'trusted_image_certificates': [self.authority.id]}})
        self.wait_for(lambda: self._settled(server, 'ACTIVE'), 'rebuild')
        self.assertEqual(4, self.service.downloads)
        self.assertEqual(1, self.agents.imports('host1'))

    def refused_beside_one(self, image, reason):
        server = self.trusting(self.authority, image=image, status='ERROR')
        self.assertIn(reason, server['fault']['message'])
        self.delete(server)

    def test_other_data_in_the_store(self):
        """What was signed is not what the image store gives."""
        self.glance._imagedata[self.signed] = base.tarball(
            'sbin/init', 'etc/other')
        self.refused(self.authority, image=self.signed)
        self.assertEqual([], self.agents.client('host1').layer_list())

    def nameless(self):
        """An image whose layer has no name that says what is in it.

        :returns: its id, and what changes the data that Glance has
        """
        image = self.make_image(
            self.data, properties=self.signer.sign(self.data),
            os_hash_algo='md5', os_hash_value='0' * 32)
        return image, functools.partial(
            self.glance._imagedata.__setitem__, image)

    def test_image_without_a_good_hash(self):
        image, give = self.nameless()
        give(self.data + b'\0' * 1024)
        self.boot(image=image)
        give(self.data)
        self.refused_beside_one(image, 'other data')
        self.trusting(self.authority, image=image, host='host2')

    def test_wanted_by_the_operator(self):
        self.flags(group='glance', verify_glance_signatures=True)
        self.boot(image=self.signed)
        server = self.boot(image=self.forged, status='ERROR')
        self.assertIn('signature does not match', server['fault']['message'])
        server = self.boot(status='ERROR')
        self.assertIn('img_signature', server['fault']['message'])

    def test_live_migration(self):
        server = self.trusting(self.authority, image=self.signed,
                               networks='none')
        del KeyManager.stored[self.authority.id]
        self.migrate(server)
        self.wait_for_migration(server, 'failed', 'error')
        self.assertEqual('host1', self.host(server))
        self.assertIn('certificate', self.reason(server))
        self.assertEqual([], self.agents.client('host2').layer_list())
        self.assertEqual('running', self.info(server)['state'])

    def test_live_migration_that_is_verified(self):
        server = self.trusting(self.authority, image=self.signed,
                               networks='none')
        self.migrate(server)
        self.wait_for_migration(server, 'completed')
        self.assertEqual('host2', self.host(server))
        self.assertEqual(2, self.service.downloads)

    def test_live_migration_onto_other_data(self):
        """The destination has a layer of that name already."""
        image, give = self.nameless()
        give(self.data + b'\0' * 1024)
        self.delete(self.boot(image=image, host='host2', networks='none'))
        give(self.data)
        server = self.trusting(self.authority, image=image, networks='none')
        self.migrate(server)
        self.wait_for_migration(server, 'failed', 'error')
        self.assertIn('other data', self.reason(server))
        self.assertEqual('running', self.info(server)['state'])

    def test_cold_migration(self):
        if agents.Agents is not agents.Real:
            self.skipTest('containers need root; run tools/run_tests.sh')
        server = self.trusting(self.authority, image=self.signed)
        self.action(server, 'VERIFY_RESIZE', 'migrate')
        self.assertEqual('host2', self.host(server))
        self.assertEqual(2, self.service.downloads)
