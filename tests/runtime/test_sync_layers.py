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


"""A layer that only the source of a migration still has."""

import os
import socket
import struct
import threading
import uuid

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime.migration import sync
from tests.runtime import sync_base
from tests.runtime.sync_base import BASE
from tests.runtime.sync_base import MIB
from tests import tarballs

#: cap_net_raw+ep, revision 2
CAPABILITY = struct.pack('<IIIII', 0x02000001, 1 << 13, 0, 0, 0)


class TestLayers(sync_base.Case):

    def setUp(self):
        super().setUp()
        self.here, self.there = (
            layers.LayerStore(self.base / name, unpack_base=0x71000000,
                              limits=layers.archive.Limits(min_free_bytes=0))
            for name in ('here', 'there'))

    def load(self, tar=None):
        tar = tar or tarballs.system()
        return self.here.import_layer(
            'sha512-' + uuid.uuid4().hex, [tar.bytes()], image='an image')

    def fetch(self, info, *, data=None, store=None, **kw):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                server = sync.serve_layer(self.here, info.key, theirs)
            try:
                return sync.fetch_layer(
                    store or self.there,
                    info.to_dict() if data is None else data, lambda: ours,
                    timeout=sync_base.PATIENCE, **kw)
            finally:
                server.close()

    def assert_nothing_there(self, store=None):
        store = store or self.there
        self.assertEqual([], list(store.list()))
        self.assertEqual([], os.listdir(store._dir / '.staging'))
        self.assertEqual([], os.listdir(store._dir / '.locks'))

    def test_copy(self):
        info = self.load()
        root = info.root
        (root / 'tool').write_bytes(b'x' * 5000)
        os.setxattr(root / 'tool', 'security.capability', CAPABILITY)
        os.setxattr(root / 'tool', 'user.note', b'1')
        os.link(root / 'tool', root / 'tool2')
        os.chown(root / 'tool', 1000, 65535)
        (root / 'set').write_text('x')
        (root / 'set').chmod(0o6755)
        os.utime(root, (10**9, 10**9))
        copied = self.fetch(info)
        self.assertEqual(info.to_dict(), copied.to_dict())
        self.assertEqual(copied, self.there.get(info.key))
        self.assert_trees(sync_base.tree(root), sync_base.tree(copied.root))
        self.assertEqual([], os.listdir(self.base / 'there/.staging'))

    def test_capability_counts_in_a_container(self):
        """Of the container's own root, as one that was unpacked there."""
        info = self.load()
        (info.root / 'tool').write_bytes(b'x')
        os.setxattr(info.root / 'tool', 'security.capability', CAPABILITY)
        self.a.layer = self.fetch(info).root
        self.a.mount()
        value = os.getxattr(self.a.root / 'tool', 'security.capability')
        self.assertEqual(
            (0x03000001, 1 << 13, BASE),
            tuple(struct.unpack('<IIIIII', value)[i] for i in (0, 1, 5)))

    def test_there_already(self):
        info = self.load()
        first = self.fetch(info)
        # Nobody serves: nothing is asked for.
        self.assertEqual(first, sync.fetch_layer(
            self.there, info.to_dict(), None, timeout=1.0))

    def test_two_at_once(self):
        info = self.load()
        results = []

        def fetch():
            results.append(self.fetch(info))

        threads = [threading.Thread(target=fetch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(sync_base.PATIENCE)
        self.assertEqual([info.to_dict()] * 3,
                         [result.to_dict() for result in results])

    def test_missing(self):
        error = self.assertRaises(
            errors.ContainerError, sync.serve_layer, self.here,
            'sha512-' + 'a' * 64, None)
        self.assertEqual('layer_missing', error.code)

    def refuse(self, code, info, **kw):
        error = self.assertRaises(
            errors.ContainerError, self.fetch, info, **kw)
        self.assertEqual(code, error.code, str(error))
        self.assert_nothing_there()
        return error

    def test_wrong_descriptions(self):
        info = self.load()
        good = info.to_dict()
        for data in ({}, good | {'key': '../../etc'}, good | {'key': 5},
                     good | {'more': 1},
                     {k: v for k, v in good.items() if k != 'bytes'}):
            self.refuse('invalid', info, data=data)
        self.refuse('internal', info, data=good | {'format': 99})
        self.refuse('image_wrong_arch', info, data=good | {'arch': 's390x'})

    def test_devices(self):
        info = self.load()
        os.mknod(info.root / 'disk', 0o60666, os.makedev(8, 0))
        error = self.refuse('invalid', info)
        self.assertIn('device', str(error))

    def test_owners(self):
        info = self.load()
        (info.root / 'file').write_text('x')
        os.chown(info.root / 'file', 65536, 0)
        self.refuse('invalid', info)

    def test_attributes_of_overlayfs(self):
        info = self.load()
        (info.root / 'directory').mkdir()
        os.setxattr(info.root / 'directory', 'trusted.overlay.redirect',
                    b'/etc')
        copied = self.fetch(info)
        self.assertEqual([], os.listxattr(copied.root / 'directory'))

    def test_full_disk(self):
        info = self.load()
        (info.root / 'large').write_bytes(os.urandom(40 * MIB))
        small = sync_base.Side(self.base / 'small', self.layer, 'loop')
        self.addCleanup(small.close)
        store = layers.LayerStore(
            small.upper.parent / 'layers', unpack_base=0x71000000)
        # It is known before the copy.
        error = self.assertRaises(
            errors.ContainerError, self.fetch, info, store=store)
        self.assertEqual('no_space', error.code, str(error))
        self.assertIn('MiB are free', str(error))
        self.assert_nothing_there(store)
        # And where it could not be: another took the room meanwhile.
        store = layers.LayerStore(
            small.upper.parent / 'layers', unpack_base=0x71000000,
            limits=layers.archive.Limits(min_free_bytes=0))
        error = self.assertRaises(
            errors.ContainerError, self.fetch, info, store=store)
        self.assertEqual('no_space', error.code, str(error))
        self.assertIn('No space left', str(error))
        self.assert_nothing_there(store)

    def test_too_large(self):
        info = self.load()
        for limits in ({'bytes': info.bytes - 1}, {'entries': 2}):
            store = layers.LayerStore(
                self.base / 'there', unpack_base=0x71000000,
                limits=layers.archive.Limits(min_free_bytes=0, **limits))
            error = self.assertRaises(
                errors.ContainerError, self.fetch, info, store=store)
            self.assertEqual('image_too_large', error.code)
            self.assert_nothing_there(store)

    def test_wait_for_another_is_cancelled(self):
        info = self.load()
        with self.there.locked(info.key):
            error = self.assertRaises(
                errors.ContainerError, self.fetch, info,
                cancelled=lambda: True)
        self.assertEqual('aborted', error.code)
        self.assert_nothing_there()

    def test_cut_off(self):
        info = self.load()
        (info.root / 'large').write_bytes(os.urandom(8 * MIB))
        outer, theirs = socket.socketpair()
        inner, ours = socket.socketpair()
        with theirs:
            server = sync.serve_layer(self.here, info.key, theirs)
        self.addCleanup(server.close)
        valve = sync_base.Valve(outer, inner, 2 * MIB)
        self.addCleanup(valve.close)

        def cut():
            valve.stopped.wait(sync_base.PATIENCE)
            server.close()
            valve.go.set()

        thread = threading.Thread(target=cut)
        thread.start()
        with ours:
            self.assertRaises(
                errors.ContainerError, sync.fetch_layer, self.there,
                info.to_dict(), lambda: ours, timeout=sync_base.PATIENCE)
        thread.join()
        self.assert_nothing_there()
