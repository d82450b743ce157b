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

"""What no container can have is refused by the host that is to have it."""

from nova.objects import fields

from tests.functional import base

OTHER = 'aarch64' if fields.Architecture.from_host() != 'aarch64' else 'x86_64'


class PromisesTest(base.TestCase):

    def assert_refused(self, text, **values):
        server = self.boot(status='ERROR', networks='none', **values)
        self.assertIn(text, server['fault']['message'])
        self.assert_nothing_left()

    def test_of_an_image(self):
        """Nova's scheduler sends it here: image_metadata_prefilter is off."""
        self.assert_refused(
            f'property hw_emulation_architecture={OTHER}: nothing is '
            'emulated',
            image=self.make_image(self.image_data(), properties={
                'hw_emulation_architecture': OTHER}))

    def test_of_a_flavor(self):
        """As if somebody had given the host a trait that it has not."""
        node = self._get_provider_uuid_by_host('host1')
        self._set_provider_traits(node, [
            *self._get_provider_traits(node),
            'COMPUTE_SECURITY_UEFI_SECURE_BOOT'])
        self.flavor = self._create_flavor(
            memory_mb=256, vcpu=1, disk=1, ephemeral=0, extra_spec={
                'os:secure_boot': 'required'})
        self.assert_refused(
            'flavor extra spec os:secure_boot=required: a container has no '
            'firmware')
