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

"""This driver in the place of Nova's fake one, and what it needs around it.

Nova's tests name ``fake.FakeDriver`` or one of its variants. Most variants
only add to it: a failure at a certain moment, resources of a provider, how
large the host is. Others are made by a test that replaces a method of it. So
the class itself is changed: it loses its methods and gets our driver as its
base, and all that is made of it goes on to work.
"""

import functools
import hashlib
import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

from nova import test as nova_test
from nova.tests.fixtures import cinder
from nova.tests.fixtures import glance
from nova.tests.fixtures import os_brick
from nova.tests.functional import integrated_helpers
from nova.virt import fake
from os_brick.initiator import connector
from os_brick import privileged
import os_vif
from oslo_utils.fixture import uuidsentinel
from oslo_utils import units

from nova_pycontainer import driver
from tests.functional import agents
from tests.functional import images
from tests import loop
from tests.novafunctional import hosts

#: What variants of the fake driver have that is neither a failure nor a
#: resource but stands for what our driver does itself.
_PRETENDED = ('cache_image', 'live_migration', 'live_migration_abort',
              'live_migration_force_complete', 'post_live_migration',
              'capabilities')


class _Sized:
    """An agent's client; it says that the host is as large as a test thinks.

    Tests count in the sizes of the variant that they name.
    """

    def __init__(self, client, fake_driver):
        self._client = client
        self._fake_driver = fake_driver

    def __getattr__(self, name):
        return getattr(self._client, name)

    def host_info(self):
        size = self._fake_driver
        disk = size.local_gb * units.Gi
        return {**self._client.host_info(),
                'cpus': size.vcpus,
                'memory_bytes': size.memory_mb * units.Mi,
                'disk_total_bytes': disk, 'disk_free_bytes': disk}


class Driver(driver.PyContainerDriver):
    """Becomes the base of the fake driver."""

    harness = None

    def __init__(self, virtapi, read_only=False):
        super().__init__(virtapi)
        self._watcher = None
        self.harness.test.addCleanup(self._stop)

    def _stop(self):
        if self._watcher is not None:
            self._watcher.stop()

    def _agent_client(self, host):
        return _Sized(self.harness.hosts.client(host), self)

    def _node_uuid(self, host):
        # Tests know this one.
        return getattr(uuidsentinel, f'node_{host}')


def _replace_fake_driver():
    kept = {'vcpus', 'memory_mb', 'local_gb', '__module__', '__doc__',
            '__dict__', '__weakref__'}
    for name in list(vars(fake.FakeDriver)):
        if name not in kept:
            delattr(fake.FakeDriver, name)
    fake.FakeDriver.__bases__ = (Driver,)
    for variant in vars(fake).values():
        if (isinstance(variant, type) and variant is not fake.FakeDriver and
                issubclass(variant, fake.FakeDriver)):
            for name in _PRETENDED:
                if name in vars(variant):
                    delattr(variant, name)


class _Glance:
    """Makes the images of Nova's fixture ones that can be started."""

    def __init__(self):
        path = subprocess.run(
            [agents.ROOT / 'tools/images/build.sh', 'busybox'], check=True,
            text=True, stdout=subprocess.PIPE, timeout=1200).stdout.split()[-1]
        self.root = _without_dhcp(subprocess.run(
            ['zstd', '--decompress', '--stdout', path], check=True,
            stdout=subprocess.PIPE, timeout=60).stdout)
        fixture = glance.GlanceFixture
        self._setup, self._create = fixture.setUp, fixture.create
        fixture.setUp = functools.partialmethod(_call, self.set_up)
        fixture.create = functools.partialmethod(_call, self.create)
        fixture.download = functools.partialmethod(_call, self.download)

    def system(self, image_id):
        """A root tarball and its hash; no two images have the same one."""
        data = io.BytesIO(self.root)
        with tarfile.open(fileobj=data, mode='a') as archive:
            member = tarfile.TarInfo('etc/image')
            member.size = len(image_id)
            archive.addfile(member, io.BytesIO(image_id.encode()))
        content = data.getvalue()
        return content, hashlib.sha512(content).hexdigest()

    def set_up(self, fixture):
        self._setup(fixture)
        images.Store(fixture)
        # Tests take the first one that there is.
        del fixture.detail

    def create(self, fixture, context, metadata, data=None):
        # Without an id it is the snapshot of a server, whose data follow. One
        # stays what it is: a test wants an image that hosts refuse.
        if data is None and metadata.get('id') not in (
                None, fixture.auto_disk_config_disabled_image['id']):
            content, digest = self.system(str(metadata['id']))
            metadata = {**metadata, 'disk_format': 'raw',
                        'container_format': 'bare', 'size': len(content),
                        'os_hash_algo': 'sha512', 'os_hash_value': digest}
        return self._create(fixture, context, metadata, data)

    def download(self, fixture, context, image_id, data=None, dst_path=None,
                 trusted_certs=None):
        fixture.show(context, image_id)
        content = fixture._imagedata.get(image_id)
        if content is None:
            content = self.system(image_id)[0]
        data.write(content)


def _without_dhcp(root):
    """Nobody answers, and until it knows that, init heeds no shutdown."""
    data = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(root)) as before, \
            tarfile.open(fileobj=data, mode='w') as after:
        for member in before:
            content = None
            if member.isreg():
                content = before.extractfile(member).read()
                if member.name.endswith('/init.d/rcS'):
                    content = content.replace(b'udhcpc -b', b': -b')
                    member.size = len(content)
            after.addfile(member, content and io.BytesIO(content))
    return data.getvalue()


def _call(fixture, function, *args, **kwargs):
    return function(fixture, *args, **kwargs)


#: Bytes.
_VOLUME = 48 << 20


class _Volumes(dict):
    """What Nova's Cinder says of volumes: each is a device of all hosts.

    :param root: tarball of the system that is on each
    """

    def __init__(self, root):
        super().__init__()
        self._devices = {}
        self._top = pathlib.Path(tempfile.mkdtemp(
            prefix='pyc-volumes-', dir=agents.WORK))
        self._system = self._top / 'system'
        with self._system.open('xb') as f:
            os.truncate(f.fileno(), _VOLUME)
        with (tempfile.TemporaryDirectory(dir=self._top) as tree,
              tarfile.open(fileobj=io.BytesIO(root)) as archive):
            archive.extractall(tree)
            subprocess.run(
                ['mkfs.ext4', '-q', '-F', '-d', tree, self._system],
                check=True, timeout=60)

    def get(self, volume_id, default=None):
        if volume_id not in self._devices:
            device = loop.Loop(self._top / str(volume_id), _VOLUME)
            subprocess.run(
                ['dd', f'if={self._system}', f'of={device.path}', 'bs=1M',
                 'status=none'], check=True, timeout=60)
            self._devices[volume_id] = device
        return {'driver_volume_type': 'local', 'data': {
            'device_path': self._devices[volume_id].path}}

    def clean(self):
        while self._devices:
            self._devices.popitem()[1].close()

    def remove(self):
        self.clean()
        shutil.rmtree(self._top)


class _Patience:
    """``time`` for helpers that ask ten times, every half of a second.

    A container takes longer to start than a record of the fake driver. So
    the pauses grow, unless the server is in an error, which few get over.
    """

    def __init__(self):
        self._frame = None
        self._count = 0

    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        frame = sys._getframe(1)
        self._count = self._count + 1 if frame is self._frame else 0
        self._frame = frame
        server = frame.f_locals.get('server')
        failed = isinstance(server, dict) and server.get('status') == 'ERROR'
        time.sleep(seconds * (1 if failed else max(1, self._count)))

    def forget(self):
        self._frame = None


class Harness:
    """All that is changed; one for the process."""

    def __init__(self):
        self.hosts = hosts.Hosts()
        self.test = None

    def install(self):
        """For the rest of the process, tests of Nova use our driver."""
        os_vif.initialize()
        self.hosts.start()
        Driver.harness = self
        _replace_fake_driver()
        self.glance = _Glance()
        self.volumes = _Volumes(self.glance.root)
        cinder.CinderFixture.VOLUME_CONNECTION_INFO = self.volumes
        self.patience = _Patience()
        integrated_helpers.time = self.patience
        # There is no Open vSwitch.
        os_vif.plug = os_vif.unplug = lambda vif, info: None
        # This process is root itself, and Nova's tests may not look at the
        # machine's adapters.
        privileged.default.set_client_mode(False)
        connector.get_connector_properties = os_brick.get_connector_properties
        set_up = nova_test.TestCase.setUp

        def begin(test):
            self.begin(test)
            set_up(test)

        nova_test.TestCase.setUp = begin

    def begin(self, test):
        self.test = test
        # Tests of the cache expect to be the first ones on their hosts.
        if 'cache' in test.id().lower():
            self.hosts.remove()
        test.addCleanup(self.end)
        if hasattr(test, '_complete_live_migration'):
            # What GracefulShutdownTestBase has in the place of a driver's
            # live migration; without it the driver's own goes on.
            test._complete_live_migration = None
        # Nova's fixture looks below its source tree, the wheel has it
        # elsewhere.
        test.flags(group='wsgi', api_paste_config=os.path.join(
            sys.prefix, 'etc', 'nova', 'api-paste.ini'))
        test.flags(agent_lost_timeout=0, group='pycontainer')

    def logs(self):
        return {name: self.hosts.log(name) for name in self.hosts.names()}

    def end(self):
        self.patience.forget()
        try:
            self.hosts.clean()
        except BaseException:
            # The next test begins with new ones.
            self.hosts.remove()
            raise
        finally:
            self.volumes.clean()

    def remove(self):
        """Leave nothing of the hosts on this machine."""
        self.hosts.remove()
        self.volumes.remove()
