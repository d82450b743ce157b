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

import json

import fixtures
from nova.compute import provider_tree
import nova.conf
from nova import exception
from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import host
from tests.unit.driver import base


class Record:
    """The service's record in the database."""

    def __init__(self, disabled=False, reason=None):
        self.disabled = disabled
        self.disabled_reason = reason
        self.saves = 0
        self.compute_node = objects.ComputeNode(uuid=uuids.node)

    def save(self):
        self.saves += 1


class Base(base.TestCase):

    def setUp(self):
        super().setUp()
        self.virtapi = base.VirtAPI()
        self.host = host.Host(
            self.agent, nova.conf.CONF, 'host1', uuids.node, '192.0.2.1')


class HostTestCase(Base):

    def test_resources_are_what_nova_takes(self):
        resources = self.host.resources('up 3 days')
        node = objects.ComputeNode()
        node.update_from_virt_driver(resources)
        self.assertEqual(
            ('host1', uuids.node, 8, 16384, 100, 60),
            (node.hypervisor_hostname, node.uuid, node.vcpus,
             node.memory_mb, node.local_gb, node.disk_available_least))
        self.assertEqual(('pycontainer', 1),
                         (node.hypervisor_type, node.hypervisor_version))
        spec = node.supported_hv_specs[0]
        self.assertEqual(('x86_64', 'lxc', 'exe'),
                         (spec.arch, spec.hv_type, spec.vm_mode))
        self.assertEqual('x86_64', json.loads(node.cpu_info)['arch'])
        self.assertEqual({'uptime': 'up 3 days'}, resources['stats'])

    def tree(self):
        tree = provider_tree.ProviderTree()
        tree.new_root('host1', uuids.node, generation=1)
        return tree

    def update(self, tree):
        self.host.update_provider_tree(
            tree, 'host1', {'VCPU': 4.0, 'MEMORY_MB': 1.0, 'DISK_GB': 2.0}, 3)
        return tree.data('host1')

    def test_inventory(self):
        self.flags(reserved_host_memory_mb=512, reserved_host_cpus=1)
        inventory = self.update(self.tree()).inventory
        self.assertEqual({
            'VCPU': (8, 1, 4.0), 'MEMORY_MB': (16384, 512, 1.0),
            'DISK_GB': (100, 3, 2.0)}, {
                name: (i['total'], i['reserved'], i['allocation_ratio'])
                for name, i in inventory.items()})

    def test_nothing_is_not_reported(self):
        info = self.agent.host_info()
        self.agent.host_info = lambda: {**info, 'disk_total_bytes': 0}
        self.assertNotIn('DISK_GB', self.update(self.tree()).inventory)

    def test_only_own_traits_are_touched(self):
        tree = self.tree()
        tree.add_traits('host1', 'CUSTOM_GOLD', 'HW_CPU_X86_VMX',
                        'HW_CPU_X86_AVX', 'CUSTOM_PYCONTAINER_OLD')
        self.assertEqual(
            {'CUSTOM_GOLD', 'HW_CPU_X86_VMX', 'CUSTOM_PYCONTAINER',
             'CUSTOM_PYCONTAINER_DISK_LIMIT'}, self.update(tree).traits)

    def test_features_of_the_cpus(self):
        self.agent.cpu_flags = [
            'aes', 'avx512f', 'avx512_vnni', 'fpu', 'pni', 'sse4_1', 'sse4a']
        self.assertEqual(
            {f'HW_CPU_X86_{name}' for name in (
                'AESNI', 'AVX512F', 'AVX512VNNI', 'SSE3', 'SSE41', 'SSE4A')},
            {trait for trait in self.update(self.tree()).traits
             if trait.startswith('HW_')})

    def test_disk_limit_that_is_not_enforced_has_no_trait(self):
        info = self.agent.host_info()
        self.agent.host_info = lambda: {**info, 'disk_limit': 'none'}
        self.assertEqual({'CUSTOM_PYCONTAINER'},
                         self.update(self.tree()).traits)

    def test_names_of_features_become_traits(self):
        self.assertEqual(
            {'CUSTOM_PYCONTAINER', 'CUSTOM_PYCONTAINER_LAZY_PAGES'},
            host.traits({'lazy-pages': True, 'pre-dump': False}))


class ServiceTestCase(Base):

    def set_enabled(self, record, *args, **kwargs):
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Service.get_by_compute_host',
            lambda cls, context, name: record))
        self.host.set_enabled(self.virtapi, *args, **kwargs)
        return record.disabled, record.disabled_reason

    def test_disable_and_enable(self):
        record = Record()
        disabled, reason = self.set_enabled(record, False, reason='no agent')
        self.assertTrue(disabled)
        self.assertEqual('AUTO: pycontainer: no agent', reason)
        self.assertEqual((False, None), self.set_enabled(record, True))
        self.assertEqual([(uuids.node, False), (uuids.node, True)],
                         self.virtapi.statuses)

    def test_operators_choice_stays(self):
        for reason in ('maintenance', None, 'AUTO: libvirt'):
            record = Record(True, reason)
            self.assertEqual((True, reason), self.set_enabled(record, True))
            self.assertEqual((True, reason), self.set_enabled(
                record, False, reason='no agent'))
            self.assertEqual(0, record.saves)

    def test_nothing_to_do(self):
        record = Record()
        self.set_enabled(record, True)
        self.assertEqual(0, record.saves)

    def test_long_reason_fits_the_column(self):
        _, reason = self.set_enabled(Record(), False, reason='x' * 999)
        self.assertEqual(255, len(reason))

    def test_no_record_yet(self):
        def missing(cls, context, name):
            raise exception.ComputeHostNotFound(host=name)

        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Service.get_by_compute_host', missing))
        # Whoever asks tries again.
        self.assertFalse(self.host.set_enabled(self.virtapi, True))

    def test_placement_that_fails_is_no_error(self):
        def fail(context, uuid, enabled):
            raise exception.ResourceProviderUpdateFailed(url='', error='')

        self.virtapi.update_compute_provider_status = fail
        record = Record()
        self.assertTrue(self.set_enabled(record, False, reason='x')[0])
        self.assertEqual(1, record.saves)
