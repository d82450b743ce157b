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

"""Nova's services in one process, with this driver on every host."""

import contextlib
import hashlib
import io
import os
import sys
import tarfile
import time
import uuid

import fixtures
from nova import context as nova_context
from nova import objects
from nova.tests.functional import integrated_helpers
import os_vif
from oslo_utils import uuidutils

from nova_pycontainer import driver
from nova_pycontainer import loader
from tests.functional import agents

# As nova-compute does; it makes the driver loadable.
os_vif.initialize()

HOSTS = ('host1', 'host2')


class Driver(driver.PyContainerDriver):
    """With one agent for each host; all hosts share nova.conf here."""

    agents = None

    def _agent_client(self, host):
        return self.agents.client(host)

    def _node_uuid(self, host):
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, host))


def tarball(*names, content=b''):
    """Return a root tarball of these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode='w') as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.mode, member.size = 0o755, len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


@contextlib.contextmanager
def microversion(api, version):
    """Use another version of Nova's API for a while."""
    before = api.microversion
    api.microversion = version
    try:
        yield
    finally:
        api.microversion = before


class TestCase(integrated_helpers.ProviderUsageBaseTestCase):
    """Two hosts, a flavor and an image."""

    compute_driver = 'pycontainer.PyContainerDriver'
    #: Of the agents.
    agent_options: dict[str, object] = {}

    def setUp(self):
        # Nova's fixture looks below its source tree, the wheel has it
        # elsewhere.
        self.flags(group='wsgi', api_paste_config=os.path.join(
            sys.prefix, 'etc', 'nova', 'api-paste.ini'))
        self.agents = agents.Agents(**self.agent_options)
        self.agents.setUp()
        self.addCleanup(self.agents.cleanUp)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_pycontainer.driver.PyContainerDriver',
            type('Driver', (Driver,), {'agents': self.agents})))
        sys.modules.pop(loader.ALIAS, None)
        self.addCleanup(sys.modules.pop, loader.ALIAS, None)
        # Open vSwitch, which no test here has.
        self.plugged = {}
        self.useFixture(fixtures.MonkeyPatch('os_vif.plug', self._plug))
        self.useFixture(fixtures.MonkeyPatch('os_vif.unplug', self._unplug))
        super().setUp()
        # A lost agent is reported at once and found again at once.
        self.flags(agent_lost_timeout=0, group='pycontainer')
        self.addCleanup(self._stop_computes)
        for host in HOSTS:
            self._start_compute(host)
        self.flavor = self._create_flavor(
            memory_mb=256, vcpu=1, disk=1, ephemeral=0)
        self.image = self.make_image(self.image_data())

    def image_data(self):
        """The root tarball of a small system."""
        if agents.Agents is agents.InMemory:
            return tarball('sbin/init')
        return agents.image('busybox')

    def _stop_computes(self):
        for compute in self.computes.values():
            compute.stop()

    def _plug(self, vif, info):
        self.plugged[vif.vif_name] = info.uuid

    def _unplug(self, vif, info):
        self.plugged.pop(vif.vif_name, None)

    # Images

    def make_image(self, data, **values):
        """Return the id of a new image in Glance."""
        image_id = uuidutils.generate_uuid()
        self.glance.create(None, {
            'id': image_id, 'name': 'root', 'status': 'active',
            'disk_format': 'raw', 'container_format': 'bare',
            'size': len(data), 'min_ram': 0, 'min_disk': 0,
            'os_hash_algo': 'sha512',
            'os_hash_value': hashlib.sha512(data).hexdigest(),
            'properties': {}, **values}, io.BytesIO(data))
        return image_id

    # Servers

    def boot(self, *, host='host1', image=None, networks='auto',
             status='ACTIVE', wait=True, **values):
        """Create a server, and wait until it is in a state."""
        request = self._build_server(
            image_uuid=image or self.image, flavor_id=self.flavor,
            networks=networks, host=host)
        request.update(values)
        server = self.api.post_server({'server': request})
        return self.wait(server, status) if wait else server

    def wait(self, server, status):
        def reached():
            now = self.api.get_server(server['id'])
            if now['status'] == 'ERROR' and 'fault' not in now:
                # It is recorded after the state.
                return None
            if now['status'] == 'ERROR' != status:
                self.fail(f'{server["id"]}: {now["fault"]["message"]}')
            return now if now['status'] == status else None

        return self.wait_for(reached, f'{server["id"]} {status}')

    def wait_for_task(self, server, task):
        self.wait_for(
            lambda: task == self.api.get_server(
                server['id'])['OS-EXT-STS:task_state'],
            f'{server["id"]} {task}')

    def wait_for(self, condition, what, seconds=agents.PATIENCE):
        """Wait until ``condition()`` is true, and return what it returned."""
        deadline = time.monotonic() + seconds
        while True:
            result = condition()
            if result:
                return result
            if time.monotonic() > deadline:
                self.fail(f'{what} did not happen within {seconds} s')
            time.sleep(0.1)

    def instance(self, server, host='host1'):
        """Return the server as the compute host sees it."""
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.host_mappings[host].cell_mapping) as context:
            return objects.Instance.get_by_uuid(
                context, server['id'], expected_attrs=['system_metadata'])

    def info(self, server, host='host1'):
        return self.agents.client(host).info(server['id'])

    def action(self, server, status, name, argument=None):
        """Do an action of the API and wait for the server's state."""
        self.api.post_server_action(server['id'], {name: argument})
        return self.wait_for(
            lambda: self._settled(server, status), f'{name} to {status}')

    def _settled(self, server, status):
        server = self.api.get_server(server['id'])
        self.assertNotEqual('ERROR', server['status'], server)
        return (server if server['status'] == status and
                server['OS-EXT-STS:task_state'] is None else None)

    def delete(self, server):
        self.api.delete_server(server['id'])
        self._wait_until_deleted(server)

    def assert_nothing_left(self, host='host1'):
        self.assertEqual([], self.agents.leftovers(host))
        self.assertEqual({}, self.plugged)

    # Services

    def restart_agent(self, host, **env):
        with self._agent_gone(host):
            self.agents.start(host, **env)

    def configure_agent(self, host, **options):
        with self._agent_gone(host):
            self.agents.configure(host, **options)

    @contextlib.contextmanager
    def _agent_gone(self, host):
        """Nova places no server there before it has found it again."""
        self.agents.stop(host)
        self.wait_for(lambda: self.service(host)['status'] == 'disabled',
                      'Nova to miss the agent')
        yield
        self.wait_for(lambda: self.service(host)['status'] == 'enabled',
                      'Nova to find the agent')

    def service(self, host='host1'):
        return self.admin_api.get_services(
            host=host, binary='nova-compute')[0]

    def periodic(self, name, host='host1'):
        """Run a periodic task of the compute manager."""
        with nova_context.target_cell(
                nova_context.get_admin_context(),
                self.host_mappings[host].cell_mapping) as context:
            getattr(self.computes[host].manager, name)(context)

    def restart(self, host='host1'):
        """Restart nova-compute; the driver is made anew."""
        self.computes[host] = self.restart_compute_service(
            self.computes[host], keep_hypervisor_state=False)
