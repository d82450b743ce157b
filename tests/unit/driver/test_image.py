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

import hashlib
import threading

import cryptography.exceptions
from cursive import exception as cursive_exception
import ddt
from nova import exception
from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import image
from nova_pycontainer.runtime import errors
from tests.unit.driver import base


class Glance:
    """Glance as nova.image.glance.API shows it.

    ``download`` writes in small pieces and, as Nova does, reports a bad
    signature only when all has been written.
    """

    def __init__(self, data=b'', **meta):
        self.data = data
        self.meta = meta
        self.error = None
        self.downloads = []
        self.gate = None

    def get(self, context, image_id):
        return {'id': image_id, **self.meta}

    def download(self, context, image_id, data=None, trusted_certs=None):
        self.downloads.append((data is not None, trusted_certs))
        if self.gate is not None:
            self.gate.wait(30)
        for start in range(0, len(self.data), 1000):
            if data is not None:
                data.write(self.data[start:start + 1000])
        if self.error is not None:
            raise self.error


@ddt.ddt
class ImageTestCase(base.TestCase):

    def setUp(self):
        super().setUp()
        self.data = base.make_tarball('sbin/init', 'etc/os-release')
        self.digest = hashlib.sha512(self.data).hexdigest()
        self.images = image.Images(self.agent, 30)
        self.glance = self.images._api = Glance(
            self.data, os_hash_algo='sha512', os_hash_value=self.digest)

    def ensure(self, flavor=None, meta=None, **values):
        return self.images.ensure(
            self.context, self.make_instance(flavor, **values),
            self.make_image_meta(**(meta or {})))

    def threads(self):
        return [t for t in threading.enumerate()
                if t.name.startswith('image-')]

    def test_import(self):
        key = self.ensure()
        self.assertEqual(f'sha512-{self.digest}', key)
        self.assertEqual([key], list(self.agent.layers))
        self.assertEqual([], self.threads())

    def test_layer_that_is_there_is_not_downloaded(self):
        self.assertEqual(self.ensure(), self.ensure())
        self.assertEqual([(True, None)], self.glance.downloads)

    def test_other_image_with_the_same_data_shares_the_layer(self):
        self.assertEqual(self.ensure(), self.ensure(
            meta={'id': uuids.other}))
        self.assertEqual(1, self.agent.imports)

    @ddt.data({}, {'os_hash_algo': 'md5', 'os_hash_value': 'a' * 32},
              {'os_hash_algo': 'sha512', 'os_hash_value': '../../x'})
    def test_image_without_a_good_hash_has_a_layer_of_its_own(self, meta):
        self.glance.meta = meta
        key = self.ensure()
        self.assertEqual('image-' + uuids.image.replace('-', ''), key)

    def test_at_once_unpacked_once(self):
        self.glance.gate = threading.Event()
        keys = []
        threads = [threading.Thread(
            target=lambda: keys.append(self.ensure())) for _ in range(4)]
        for thread in threads:
            thread.start()
        self.glance.gate.set()
        for thread in threads:
            thread.join(30)
        self.assertEqual([f'sha512-{self.digest}'] * 4, keys)
        self.assertEqual(1, self.agent.imports)
        self.assertEqual(1, len(self.glance.downloads))

    def test_failed_download_is_the_error_and_leaves_no_layer(self):
        self.glance.error = exception.ImageNotFound(image_id=uuids.image)
        self.assertRaises(exception.ImageNotFound, self.ensure)
        self.assertEqual({}, self.agent.layers)

    def test_broken_connection(self):
        self.glance.error = OSError(32, 'Corrupt image download')
        error = self.assertRaises(exception.CouldNotFetchImage, self.ensure)
        self.assertIn('Corrupt image download', str(error))
        self.assertIn(uuids.image, str(error))
        self.assertEqual({}, self.agent.layers)

    def test_bad_signature_after_all_data(self):
        self.glance.error = cryptography.exceptions.InvalidSignature()
        error = self.assertRaises(exception.ImageUnacceptable, self.ensure)
        self.assertIn('signature', str(error))
        self.assertEqual({}, self.agent.layers)

    def test_certificate_that_is_missing(self):
        self.glance.error = cursive_exception.SignatureVerificationError(
            reason='no certificate')
        error = self.assertRaises(exception.ImageUnacceptable, self.ensure)
        self.assertIn('no certificate', str(error))

    def test_certificates_are_passed(self):
        certs = objects.TrustedCerts(ids=[uuids.cert])
        self.ensure(trusted_certs=certs)
        self.assertEqual(certs, self.glance.downloads[0][1])

    def test_cached_layer_is_verified_for_who_asks_for_it(self):
        self.ensure()
        self.glance.error = cryptography.exceptions.InvalidSignature()
        certs = objects.TrustedCerts(ids=[uuids.cert])
        self.assertRaises(exception.ImageUnacceptable, self.ensure,
                          trusted_certs=certs)
        self.glance.error = None
        self.ensure(trusted_certs=certs)
        before = len(self.glance.downloads)
        # Once is enough for the same certificates.
        self.ensure(trusted_certs=certs)
        self.assertEqual(before, len(self.glance.downloads))
        self.ensure(trusted_certs=objects.TrustedCerts(ids=[uuids.other]))
        self.assertEqual(before + 1, len(self.glance.downloads))
        self.assertEqual(1, self.agent.imports)

    def test_import_is_the_verification(self):
        certs = objects.TrustedCerts(ids=[uuids.cert])
        for _ in range(2):
            self.ensure(trusted_certs=certs)
            self.assertEqual([(True, certs)], self.glance.downloads)

    def test_other_image_with_the_same_data_is_verified(self):
        certs = objects.TrustedCerts(ids=[uuids.cert])
        self.ensure(trusted_certs=certs)
        self.glance.error = cryptography.exceptions.InvalidSignature()
        self.assertRaises(exception.ImageUnacceptable, self.ensure,
                          meta={'id': uuids.other}, trusted_certs=certs)

    @ddt.data({}, {'os_hash_algo': 'md5', 'os_hash_value': 'a' * 32})
    def test_layer_of_other_data_than_are_signed(self, meta):
        """As an image store that somebody has broken into may give."""
        self.glance.meta = meta
        self.ensure()
        self.glance.data = base.make_tarball('other')
        error = self.assertRaises(
            exception.ImageUnacceptable, self.ensure,
            trusted_certs=objects.TrustedCerts(ids=[uuids.cert]))
        self.assertIn('other data', str(error))

    def test_layer_that_came_meanwhile_is_verified(self):
        """The agent reads nothing then, and says what it has."""
        self.glance.meta = {}
        self.agent.layers['came'] = {
            'image': 'x', 'bytes': 1, 'digest': f'sha512-{"0" * 128}'}

        def layer_import(key, stream, **kwargs):
            return {'key': key, **self.agent.layers['came']}

        self.agent.layer_import = layer_import
        certs = objects.TrustedCerts(ids=[uuids.cert])
        self.assertRaises(exception.ImageUnacceptable, self.ensure,
                          trusted_certs=certs)

    @ddt.data({'verify_glance_signatures': True},
              {'enable_certificate_validation': True,
               'default_trusted_certificate_ids': [uuids.cert]})
    def test_verification_that_the_operator_wants(self, options):
        self.ensure()
        self.flags(group='glance', **options)
        self.glance.error = cryptography.exceptions.InvalidSignature()
        self.assertRaises(exception.ImageUnacceptable, self.ensure)

    def test_what_a_migration_has_to_verify(self):
        certs = objects.TrustedCerts(ids=[uuids.cert])
        for key, trusted, needed in (
                ('image-1', certs, True), ('image-1', None, False),
                ('sha512-1', certs, False)):
            self.assertEqual(needed, self.images.needs_verification(
                self.make_instance(trusted_certs=trusted), key))

    def test_refusal_by_the_agent_stops_the_download(self):
        self.glance.data = b'x' * (20 << 20)
        self.agent.failures['layer_import'] = errors.ContainerError(
            'image_not_archive', 'the image is not an archive')
        error = self.assertRaises(errors.ContainerError, self.ensure)
        self.assertEqual('image_not_archive', error.code)
        for thread in self.threads():
            thread.join(30)
        self.assertEqual([], self.threads())

    def test_data_that_do_not_match_glances_hash(self):
        self.glance.data = base.make_tarball('other')
        self.assertRaises(errors.ContainerError, self.ensure)
        self.assertEqual({}, self.agent.layers)

    def test_time_limit(self):
        self.images._timeout = 0.1
        self.glance.gate = threading.Event()
        self.addCleanup(self.glance.gate.set)
        error = self.assertRaises(exception.CouldNotFetchImage, self.ensure)
        self.assertIn('image_import_timeout', str(error))
        self.assertEqual({}, self.agent.layers)

    def test_cached_image_must_fit_the_flavor(self):
        key = self.ensure()
        self.agent.layers[key]['bytes'] = 3 << 30
        self.ensure(base.make_flavor(root_gb=3))
        self.ensure(base.make_flavor(root_gb=0))
        error = self.assertRaises(
            errors.ContainerError, self.ensure, base.make_flavor(root_gb=2))
        self.assertEqual('image_too_large', error.code)
        # What a server has that was shelved is the image and its disk.
        self.ensure(base.make_flavor(root_gb=2),
                    vm_state='shelved_offloaded')

    @ddt.data({'disk_format': 'qcow2'}, {'container_format': 'ami'},
              {'disk_format': 'iso', 'container_format': 'bare'})
    def test_declared_as_something_else(self, meta):
        error = self.assertRaises(
            exception.ImageUnacceptable, self.ensure, meta=meta)
        self.assertIn(next(iter(meta.values())), str(error))
        self.assertIn('Upload a root tarball', str(error))
        self.assertEqual([], self.glance.downloads)

    @ddt.data({'container_format': 'docker'}, {'disk_format': None})
    def test_accepted_formats(self, meta):
        self.ensure(meta=meta)
