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

"""What containers do not have, and what the documentation says of that."""

import collections
import pathlib
import re

import ddt
from nova import exception
from nova import objects
from nova.objects import fields
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import flavor
from nova_pycontainer import promises
from tests.unit.driver import base

PAGE = (pathlib.Path(__file__).resolve().parents[3] /
        'doc/source/user/image-properties.rst')
OTHER = 'aarch64' if fields.Architecture.from_host() != 'aarch64' else 'x86_64'

ASKING = (
    ('hw_emulation_architecture', OTHER),
    ('hw_ephemeral_encryption', 'true'),
    ('hw_locked_memory', 'yes'),
    ('hw_mem_encryption', 'True'),
    ('hw_tpm_model', 'tpm-crb'),
    ('hw_tpm_version', '2.0'),
    ('os_secure_boot', 'required'),
)
HARMLESS = (
    ('hw_emulation_architecture', fields.Architecture.from_host()),
    ('hw_ephemeral_encryption', 'false'),
    ('hw_locked_memory', 'no'),
    ('hw_mem_encryption', 'false'),
    ('os_secure_boot', 'optional'),
    ('hw_disk_bus', 'virtio'),
)


@ddt.ddt
class PromisesTestCase(base.TestCase):

    def specification(self, properties, extra_specs):
        instance = self.make_instance(
            base.make_flavor(extra_specs=extra_specs),
            system_metadata={f'image_{k}': v for k, v in properties.items()})
        return flavor.specification(
            instance, layer='layer', nics=[], pids_max=4096)

    @ddt.idata(ASKING)
    @ddt.unpack
    def test_refused(self, name, value):
        error = self.assertRaises(
            exception.ImageUnacceptable, self.specification, {name: value},
            {})
        self.assertIn(name, str(error))
        self.assertIn(uuids.image, str(error))
        spec = promises.extra_spec(name)
        error = self.assertRaises(
            exception.InvalidInput, self.specification, {}, {spec: value})
        self.assertIn(spec, str(error))

    @ddt.idata(HARMLESS)
    @ddt.unpack
    def test_not_refused(self, name, value):
        self.specification({name: value}, {promises.extra_spec(name): value})

    def test_all_of_them(self):
        self.assertEqual({*promises.REFUSED}, {name for name, _ in ASKING})


class PageTestCase(base.TestCase):

    def test_every_property_of_novas(self):
        """A new one of Nova's has to be looked at."""
        sections = re.split(r'^(.+)\n=+\n', PAGE.read_text(), flags=re.M)
        named = {title: collections.Counter(
            name for row in re.findall(
                r'^(``.*?)(?:  |$)', text[text.find('====='):], re.M)
            for name in re.findall(r'``(\w+)``', row))
            for title, text in zip(sections[1::2], sections[2::2],
                                   strict=True)}
        everywhere = sum((
            named[title] for title in (
                'With an effect', 'Refused', 'Without effect')),
            collections.Counter())
        self.assertEqual(
            dict.fromkeys(objects.ImageMetaProps.fields, 1), everywhere)
        self.assertEqual({*promises.REFUSED}, {*named['Refused']})
