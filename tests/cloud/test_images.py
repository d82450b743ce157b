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

"""Images that no server can be made of, and images that hosts do not have."""

import gzip
import hashlib
import json
import os
import pathlib
import platform
import re
import tarfile
import tempfile
import threading
import time

from tests import cases
from tests.cloud import base
from tests import tarballs

_STORE = pathlib.Path('/var/lib/pycontainer/layers')


def _truncated():
    """The first half of a sound image."""
    data = gzip.compress(
        tarballs.system().add('usr/lib/noise', tarballs.NOISE).bytes())
    return data[:len(data) // 2]


def _bomb():
    """A few MiB that are 2 GiB of files; none of them is large."""
    size = 32 << 20
    zeros = gzip.compress(bytes(size), 1)
    data = [gzip.compress(tarballs.system().bytes(b''))]
    for number in range(64):
        head = tarballs.Tar().add(f'usr/share/zeros{number}', size=size)
        data += [gzip.compress(head.bytes(b'')), zeros]
    return b''.join((*data, gzip.compress(bytes(10240))))


def _no_init():
    return tarballs.Tar().dir('./etc').add('./etc/hostname', b'x').bytes()


def _wrong_arch():
    other = {'x86_64': 183, 'aarch64': 62}[platform.machine()]
    return (tarballs.Tar().dir('./sbin')
            .add('./sbin/init', tarballs.elf(other), mode=0o755).bytes())


def _bad(name):
    return lambda: tarballs.BAD[name][0]


#: Name: what makes the data.
_IMAGES = {
    'random': _bad('random bytes'),
    'truncated': _truncated,
    'qcow2': _bad('qcow2'),
    'upwards': _bad('dot dot'),
    'symlink': _bad('through a link out of the root'),
    'device': _bad('disk device'),
    'bomb': _bomb,
    'no-init': _no_init,
    'wrong-arch': _wrong_arch,
}


class BadImagesTest(base.CloudTestCase):

    def setUp(self):
        super().setUp()
        # All at once: they are built side by side, as tenants would.
        self.servers = self.kept('servers', self._build)

    def _build(self):
        flavor = self.flavor('ct-bad', 128, 1)
        found = {}
        for name, make in _IMAGES.items():
            data = make()
            image = self.demo.image.create_image(
                f'ct-bad-{name}', data=data, disk_format='raw',
                container_format='bare', allow_duplicates=True)
            self.addCleanup(self.demo.image.delete_image, image.id)
            server_id = self.cli(
                'server', 'create', '--image', image.id, '--flavor', flavor,
                '--network', 'private', '-f', 'value', '-c', 'id',
                f'ct-bad-{name}').strip()
            self.addCleanup(self.delete_server, server_id)
            found[name] = (image, hashlib.sha512(data).hexdigest(),
                           server_id)
        return found

    def _refused(self, name, *words):
        """The server is in ERROR, says why, and left nothing behind.

        :param words: what the fault has to match: what is wrong, the entry
            where there is one, and the remedy
        """
        image, digest, server_id = self.servers[name]
        self.wait_server(server_id, 'ERROR')
        # What the user reads.
        shown = json.loads(self.cli('server', 'show', server_id, '-f',
                                    'json'))
        message = shown['fault']['message']
        for word in (image.id, *words):
            self.assertTrue(re.search(word, message),
                            f'no {word!r} in: {message}')
        for layers, store, containers in self.kept('leftovers', self._left):
            self.assertNotIn(image.id, [layer['image'] for layer in layers])
            self.assertNotIn(digest, store)
            self.assertNotIn(server_id, containers)
        # Another host would say the same; it must not be asked.
        events = list(self.admin.compute.server_actions(server_id))
        self.assertEqual(['create'], [event.action for event in events])

    def _left(self):
        """What both hosts hold when all builds have failed."""
        for _image, _digest, server_id in self.servers.values():
            self.wait_server(server_id, 'ERROR')
        return [(self.layers(host),
                 # Names in the store are made of the image's hash.
                 self.on_host(host, 'find', str(_STORE), '-maxdepth', '2'),
                 self.on_host(host, 'find', '/var/lib/pycontainer/instances',
                              '/sys/fs/cgroup', '-maxdepth', '3'))
                for host in base.HOSTS]

    def test_random_bytes(self):
        self._refused('random', 'not an archive', 'Upload a tar')

    def test_truncated(self):
        self._refused('truncated', 'cut off', 'usr/lib/noise',
                      'Upload it again')

    def test_disk_image(self):
        self._refused('qcow2', 'qcow2', 'Upload a tar')

    def test_entry_upwards(self):
        self._refused('upwards', r"'\.\./evil'", 'upwards',
                      'Build the image again')

    def test_symlink_escape(self):
        self._refused('symlink', "'out/evil'", 'leads out',
                      'Build the image again')

    def test_device(self):
        self._refused('device', "'etc/sda'", '8:0', 'Build the image again')

    @cases.more
    def test_bomb(self):
        self._refused('bomb', r"'usr/share/zeros\d+'", 'flavor')

    def test_no_init(self):
        self._refused('no-init', 'init', 'pycontainer_init')

    def test_wrong_architecture(self):
        self._refused('wrong-arch', platform.machine(),
                      'aarch64|x86_64', 'hw_architecture')

    def test_good_image_afterwards(self):
        for _image, _digest, server_id in self.servers.values():
            self.wait_server(server_id, 'ERROR')
        for host in base.HOSTS:
            self.create_server('busybox', 'pyc.tiny', host=host,
                               name='ct-good')


class NewImageTest(base.CloudTestCase):

    #: More than a host unpacks before the second server asks for it.
    NOISE_BYTES = 192 << 20

    def _image(self):
        """busybox with so much noise that no host has its like."""
        with tempfile.TemporaryDirectory() as directory:
            path = pathlib.Path(directory, 'new.tar')
            base.run([str(base.REPO / 'tools/images/build.sh'), 'busybox',
                      str(path)], timeout=600)
            plain = path.with_suffix('.noisy')
            plain.write_bytes(path.read_bytes())
            with tarfile.open(plain, 'a') as tar:
                entry = tarfile.TarInfo('./noise')
                entry.size = self.NOISE_BYTES
                with open('/dev/urandom', 'rb') as noise:
                    tar.addfile(entry, noise)
            image = self.demo.image.create_image(
                'ct-new', filename=str(plain), disk_format='raw',
                container_format='bare', allow_duplicates=True)
        self.addCleanup(self.demo.image.delete_image, image.id)
        return self.demo.image.get_image(image.id)

    def _building(self, server_id):
        """When the host began to build a server, as Nova writes it."""
        action, = self.admin.compute.server_actions(server_id)
        events = self.admin.compute.get_server_action(
            action.request_id, server_id).events
        return next(event.start_time for event in events if event.event ==
                    'compute__do_build_and_run_instance')

    def test_two_spawns_unpack_once(self):
        host = 'host1'
        image = self._image()
        key = f'sha512-{image.hash_value}'
        # As seen from outside: a host's state is a directory of the machine.
        staging = base.CLOUD / 'data' / host / 'pycontainer/layers/.staging'
        seen = set()
        over = threading.Event()

        def watch():
            while not over.wait(0.02):
                seen.update(name for name in os.listdir(staging)
                            if name.startswith(key))

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.addCleanup(watcher.join)
        self.addCleanup(over.set)
        servers = [self.create_server(
            'busybox', 'pyc.tiny', host=host, wait=False, name=f'ct-new{n}',
            image_id=image.id) for n in range(2)]
        for server in servers:
            self.wait_server(server.id, 'ACTIVE')
        over.set()
        watcher.join()
        self.addCleanup(self._delete_servers_and_layer, servers, host, key)
        # Each unpacking has a directory of its own.
        self.assertEqual(1, len(seen), seen)
        layers = [layer for layer in self.layers(host)
                  if layer['image'] == image.id]
        self.assertEqual([key], [layer['key'] for layer in layers])
        # Both wanted it before it was there; else this would prove nothing.
        created = time.strftime('%Y-%m-%dT%H:%M:%S',
                                time.gmtime(layers[0]['created_at']))
        for server in servers:
            self.assertLess(self._building(server.id)[:19], created)
            self.assertEqual(key, self.container(server)['layer'])

    def _delete_servers_and_layer(self, servers, host, key):
        for server in servers:
            self.delete_server(server.id)
        self.delete_layer(host, key)
