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

import ddt
from nova import exception
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import flavor
from nova_pycontainer.runtime import spec as runtime_spec
from tests.unit.driver import base

LAYER = 'sha512-' + 'a' * 128


@ddt.ddt
class FlavorTestCase(base.TestCase):

    def resources(self, extra_specs=None, **values):
        return flavor.resources(
            base.make_flavor(extra_specs=extra_specs or {}, **values), 4096)

    def test_plain(self):
        self.assertEqual({
            'memory_bytes': 512 << 20, 'swap_bytes': 0, 'vcpus': 2,
            'pids_max': 4096, 'disk_bytes': 10 << 30, 'cpu_shares': None,
            'cpu_quota_us': 200000, 'cpu_period_us': 100000,
            'disk_io': {'read_bytes_s': None, 'write_bytes_s': None,
                        'read_iops': None, 'write_iops': None},
        }, self.resources())

    def test_no_disk_limit(self):
        self.assertIsNone(self.resources(root_gb=0)['disk_bytes'])

    def test_speed_of_disks(self):
        self.assertEqual(
            {'read_bytes_s': 4096, 'write_bytes_s': 8192, 'read_iops': None,
             'write_iops': 7}, self.resources({
                 'quota:disk_read_bytes_sec': '4096',
                 'quota:disk_write_bytes_sec': '8192',
                 'quota:disk_read_iops_sec': '0',
                 'quota:disk_write_iops_sec': '7'})['disk_io'])
        for name in ('bytes', 'iops'):
            spec = f'quota:disk_total_{name}_sec'
            error = self.assertRaises(
                exception.InvalidInput, self.resources, {spec: '1'})
            self.assertIn(spec, str(error))

    def test_quota_is_each_vcpus_own(self):
        result = self.resources({'quota:cpu_quota': '25000',
                                 'quota:cpu_period': '50000',
                                 'quota:cpu_shares': '512'})
        self.assertEqual((50000, 50000, 512), (
            result['cpu_quota_us'], result['cpu_period_us'],
            result['cpu_shares']))

    @ddt.data('0', '-1')
    def test_no_quota_is_all_of_the_vcpus(self, quota):
        self.assertEqual(200000, self.resources(
            {'quota:cpu_quota': quota})['cpu_quota_us'])

    def test_pids_max(self):
        self.assertEqual(100, self.resources(
            {'pycontainer:pids_max': '100'})['pids_max'])

    @ddt.data(
        {'quota:cpu_shares': '1'}, {'quota:cpu_shares': 'many'},
        {'quota:cpu_period': '999'}, {'quota:cpu_period': '1000001'},
        {'quota:cpu_quota': '999'}, {'pycontainer:pids_max': '3'})
    def test_bad_extra_specs_name_themselves(self, specs):
        error = self.assertRaises(
            exception.InvalidInput, self.resources, specs)
        self.assertIn(next(iter(specs)), str(error))

    def test_swap(self):
        self.assertEqual(64 << 20, self.resources(swap=64)['swap_bytes'])

    def test_ephemeral_disk_is_a_part_of_the_root(self):
        self.assertEqual(
            12 << 30, self.resources(ephemeral_gb=2)['disk_bytes'])
        self.assertIsNone(
            self.resources(root_gb=0, ephemeral_gb=2)['disk_bytes'])
        error = self.assertRaises(
            exception.InvalidInput, flavor.resources,
            base.make_flavor(ephemeral_gb=2), 4096, on_volume=True)
        self.assertIn('Use a flavor without it', str(error))


@ddt.ddt
class SpecificationTestCase(base.TestCase):

    def specification(self, properties=None, extra_specs=None):
        instance = self.make_instance(
            base.make_flavor(extra_specs=extra_specs or {}),
            system_metadata={f'image_{k}': v for k, v in
                             (properties or {}).items()})
        return flavor.specification(
            instance, layer=LAYER, nics=[], pids_max=4096)

    def test_runtime_accepts_it(self):
        spec = runtime_spec.Spec.from_dict(self.specification(
            {'pycontainer_init': '/sbin/init --unit "a b"',
             'pycontainer_stop_signal': 'SIGRTMIN+3'}))
        self.assertEqual(['/sbin/init', '--unit', 'a b'], spec.init_argv)
        self.assertEqual('SIGRTMIN+3', spec.stop_signal)
        self.assertEqual('web', spec.hostname)
        self.assertEqual(2, spec.vcpus)

    def test_defaults(self):
        spec = self.specification()
        self.assertEqual(
            {'argv': None, 'stop_signal': None, 'env': {}}, spec['init'])
        self.assertIs(False, spec['nesting'])
        self.assertIsNone(spec['base_id'])
        self.assertEqual(uuids.image, spec['image_id'])

    @ddt.data(
        ('init', 'sbin/init'), ('init', '/sbin/init "'),
        ('stop_signal', '15; rm'), ('nesting', 'perhaps'))
    @ddt.unpack
    def test_bad_properties_name_themselves(self, name, value):
        error = self.assertRaises(
            exception.ImageUnacceptable, self.specification,
            {f'pycontainer_{name}': value})
        self.assertIn(f'pycontainer_{name}', str(error))
        self.assertIn(uuids.image, str(error))

    @ddt.data(
        (None, None, False), (None, 'false', False),
        ('disabled', None, False), ('allowed', None, False),
        ('allowed', 'true', True), ('enabled', None, True),
        ('enabled', 'false', True))
    @ddt.unpack
    def test_nesting(self, level, wanted, expected):
        self.assertIs(expected, self.specification(
            {'pycontainer_nesting': wanted} if wanted else {},
            {'pycontainer:nesting': level} if level else {})['nesting'])

    def test_image_cannot_go_beyond_the_flavor(self):
        error = self.assertRaises(
            exception.ImageUnacceptable, self.specification,
            {'pycontainer_nesting': 'true'})
        self.assertIn('pycontainer:nesting=allowed', str(error))

    def test_bad_nesting_of_a_flavor(self):
        self.assertRaises(
            exception.InvalidInput, self.specification, {},
            {'pycontainer:nesting': 'some'})
