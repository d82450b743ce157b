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

"""Base of the driver's unit tests."""

import contextlib
import io
import tarfile

from nova import context as nova_context
from nova.network import model
from nova import objects
from nova import test
from nova.tests.unit import fake_instance
from os_vif import objects as os_vif_objects
from oslo_utils.fixture import uuidsentinel as uuids

from nova_pycontainer import conf
from tests.unit.driver import fake_agent

conf.register(test.CONF)
os_vif_objects.register_all()


def make_flavor(**values):
    values = {
        'id': 1, 'flavorid': '1', 'name': 'c1', 'memory_mb': 512, 'vcpus': 2,
        'root_gb': 10, 'ephemeral_gb': 0, 'swap': 0, 'rxtx_factor': 1.0,
        'vcpu_weight': 0, 'disabled': False, 'is_public': True,
        'extra_specs': {}, 'projects': [], **values}
    return objects.Flavor(**values)


def make_vif(number=1, **values):
    network = model.Network(
        id=uuids.network, bridge='br-int', label='net',
        subnets=[model.Subnet(
            cidr='203.0.113.0/24', ips=[model.FixedIP(address='203.0.113.10')],
            version=4)], mtu=1442)
    port = getattr(uuids, f'port{number}')
    values = {
        'id': port, 'address': f'fa:16:3e:00:00:0{number}',
        'network': network, 'type': model.VIF_TYPE_OVS,
        'details': {model.VIF_DETAILS_OVS_DATAPATH_TYPE: 'system',
                    model.VIF_DETAILS_OVS_CREATE_TAP: True},
        'devname': 'tap' + port[:11], 'ovs_interfaceid': port,
        'active': True, 'delegate_create': True, **values}
    return model.VIF(**values)


def make_tarball(*names):
    """Return a root tarball with these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w') as archive:
        for name in names or ('sbin/init',):
            archive.addfile(tarfile.TarInfo(name))
    return data.getvalue()


class VirtAPI:
    """What the compute manager gives to a driver.

    :ivar error: raised where the waiting for events would end
    :ivar waited: the events that were waited for
    """

    def __init__(self):
        self.error = None
        self.waited = []
        self.statuses = []

    @contextlib.contextmanager
    def wait_for_instance_event(self, instance, event_names, timeout=300,
                                error_callback=None):
        yield
        self.waited.append((event_names, timeout))
        if self.error is not None and event_names:
            raise self.error

    def update_compute_provider_status(self, context, rp_uuid, enabled):
        self.statuses.append((rp_uuid, enabled))


class TestCase(test.NoDBTestCase):

    def setUp(self):
        super().setUp()
        self.context = nova_context.RequestContext('user', 'project')
        self.agent = fake_agent.FakeAgent()

    def make_instance(self, flavor=None, **values):
        values = {'uuid': uuids.instance, 'image_ref': uuids.image,
                  'hostname': 'web', 'config_drive': '', 'launched_at': None,
                  'system_metadata': {}, **values}
        topology = values.pop('numa_topology', None)
        trusted_certs = values.pop('trusted_certs', None)
        instance = fake_instance.fake_instance_obj(
            self.context, flavor=flavor or make_flavor(),
            expected_attrs=['metadata', 'system_metadata'], **values)
        instance.trusted_certs = trusted_certs
        instance.numa_topology = topology
        return instance

    @staticmethod
    def make_image_meta(**values):
        return objects.ImageMeta.from_dict({
            'id': uuids.image, 'disk_format': 'raw',
            'container_format': 'bare', 'properties': {}, **values})
