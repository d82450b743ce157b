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

"""The layer store on a real kernel: every image goes through the sandbox."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import stat
import struct
import subprocess

import ddt

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import layers
from tests.runtime import layers_base
from tests import tarballs

MIB = layers_base.MIB
wait_for = layers_base.wait_for


@ddt.ddt
class TestImport(layers_base.Case):

    @ddt.data(*tarballs.PACKERS)
    def test_each_format(self, packer):
        data = tarballs.PACKERS[packer](tarballs.system().bytes())
        key = self.key()
        info = self.load(
            data, key=key, max_bytes=64 * MIB,
            digest=('sha512', hashlib.sha512(data).hexdigest().upper()))
        self.assertEqual(info, self.store.get(key))
        self.assertEqual([info], self.store.list())
        self.assertEqual(info, self.make_store().get(key))
        self.assertEqual(os.uname().machine, info.arch)
        self.assertEqual(len(data), info.compressed_bytes)
        self.assertEqual(10, info.entries)
        self.assertEqual('sha512-' + hashlib.sha512(data).hexdigest(),
                         info.digest)
        self.assertEqual(
            {**info.to_dict(), 'format': 1, 'key': key, 'image': 'an image'},
            json.loads((self.layers / key / 'layer.json').read_text()))
        self.assertNotIn('root', info.to_dict())
        self.assertTrue((info.root / 'etc/os-release').is_file())

    def test_owners_on_disk_are_the_archives(self):
        tar = (tarballs.system().add('root', b'x', uid=0, gid=0, mode=0o4755)
               .add('user', uid=1000, gid=100)
               .dir('d', uid=65535, gid=65535)
               .symlink('l', 'x', uid=33, gid=44)
               .add('p', kind=b'6', uid=1, gid=2, mode=0o600))
        root = self.load(tar.bytes()).root
        self.assertEqual(
            {'root': (0, 0, 0o4755), 'user': (1000, 100, 0o644),
             'd': (65535, 65535, 0o755), 'l': (33, 44, 0o777),
             'p': (1, 2, 0o600)},
            {name: (s.st_uid, s.st_gid, stat.S_IMODE(s.st_mode))
             for name in ('root', 'user', 'd', 'l', 'p')
             for s in [(root / name).lstat()]})

    def test_root_directory_that_no_entry_describes(self):
        self.addCleanup(os.umask, os.umask(0o077))
        root = self.load(tarballs.Tar().add('f').bytes()).root
        self.assertEqual(0o755, stat.S_IMODE(root.stat().st_mode))
        self.assertEqual((0, 0), (root.stat().st_uid, root.stat().st_gid))

    def test_lists_name_users_of_the_image_on_disk(self):
        text = 'user::rw-,user:1000:r--,group::r--,mask::r--,other::---'
        root = self.load(tarballs.system().add(
            'f', pax={'SCHILY.acl.access': text}).bytes()).root
        value = os.getxattr(root / 'f', 'system.posix_acl_access')
        self.assertEqual((2, 4, 1000), struct.unpack_from('<HHI', value, 12))

    def test_store_is_closed_to_users(self):
        # It holds set-user-id files of uid 0.
        self.layers.chmod(0o755)
        self.make_store()
        self.assertEqual(0o700, stat.S_IMODE(self.layers.stat().st_mode))

    def test_file_objects_and_iterables(self):
        data = tarballs.system().bytes()
        path = self.base / 'image'
        path.write_bytes(data)
        with open(path, 'rb') as f:
            self.load(iter(f.read, b''))
            f.seek(0)
            key = self.key()
            self.store.import_layer(key, f, image='an image')
        self.load([b'', data[:1], b'', data[1:], b''])

    def test_layer_that_is_there_is_not_unpacked_again(self):
        key = self.key()
        first = self.load(tarballs.system().bytes(), key=key)

        def never():
            raise AssertionError('the stream was read')
            yield b''

        self.assertEqual(first, self.load(never(), key=key))
        self.assertEqual(
            first, self.load(never(), key=key, max_bytes=first.bytes))
        error = self.assertRaises(
            errors.ContainerError, self.load, never(), key=key,
            max_bytes=first.bytes - 1)
        self.assertEqual('image_too_large', error.code)

    def test_wrong_digest(self):
        data = tarballs.system().bytes()
        self.refuse('invalid', 'sha256 is .* was expected', data,
                    digest=('sha256', '0' * 64))
        self.refuse('invalid', "'nonsense'", data, digest=('nonsense', '0'))
        self.refuse('invalid', "'shake_128'", data, digest=('shake_128', '0'))

    def test_wrong_architecture(self):
        tar = tarballs.Tar().add(
            'sbin/init', tarballs.elf(22, order=2), mode=0o755)
        self.refuse('image_wrong_arch', 's390x', tar.bytes())

    def test_key_that_is_a_path(self):
        for key in ('../x', 'sha256-' + 'a' * 20 + '/../..', '', '.staging'):
            error = self.assertRaises(
                errors.ContainerError, self.store.import_layer, key, [],
                image='an image')
            self.assertEqual('invalid', error.code)

    def test_devices_are_logged(self):
        tar = tarballs.system().device('dev/null').device('dev/console')
        with self.assertLogs(layers.__name__, 'INFO') as log:
            root = self.load(tar.bytes()).root
        self.assertIn('left out 2 device nodes', '\n'.join(log.output))
        self.assertEqual([], os.listdir(root / 'dev'))

    def test_stream_that_breaks(self):

        def chunks():
            yield tarballs.system().bytes()[:5000]
            raise ConnectionResetError('peer is gone')

        self.assertRaises(ConnectionResetError, self.load, chunks())
        self.check_nothing_is_left()


@ddt.ddt
class TestBadImages(layers_base.Case):

    @ddt.data(*sorted(tarballs.BAD))
    def test_refused(self, name):
        image, code, text = tarballs.BAD[name]
        key = self.key()
        error = self.assertRaises(
            errors.ContainerError, self.load, image, key=key)
        self.assertEqual(
            (code, True), (error.code, bool(re.search(text, str(error)))),
            str(error))
        self.check_nothing_is_left()
        # The next import of the same key works.
        self.load(tarballs.system().bytes(), key=key)
        self.assertEqual({'.locks', '.staging', key},
                         set(os.listdir(self.layers)))


@ddt.ddt
class TestLimits(layers_base.Case):

    @ddt.data('gzip', 'xz', 'zstd')
    def test_endless_zeros(self, packer):
        pack = tarballs.PACKERS[packer]
        zeros = pack(bytes(16 * MIB))

        def bomb():
            for i in itertools.count():
                yield pack(tarballs.header(f'f{i}', 16 * MIB)) + zeros

        store = self.make_store(max_bytes=64 * MIB)
        self.refuse('image_too_large', str(64 * MIB), bomb(), store=store)
        store = self.make_store(ratio_floor=64 * MIB)
        self.refuse('image_too_large', 'times its size', bomb(), store=store)

    def test_endless_zeros_after_the_end(self):
        # Costs no disk; the processor's time has an end of its own.
        zeros = tarballs.PACKERS['gzip'](bytes(16 * MIB))
        store = self.make_store(cpu_seconds=2, ratio=1 << 40)
        self.refuse(
            'image_too_large', 'processor time', itertools.chain(
                [tarballs.PACKERS['gzip'](tarballs.system().bytes())],
                itertools.repeat(zeros)), store=store)

    def test_million_entries(self):
        given = 0

        def entries():
            nonlocal given
            yield tarballs.system().bytes(b'')
            for start in range(0, 1_000_000, 1000):
                given = start
                yield b''.join(tarballs.header(f'd{start}/f{i}')
                               for i in range(1000))

        self.refuse('image_too_many_entries', '20000 entries', entries(),
                    store=self.make_store(max_entries=20_000))
        self.assertLess(given, 100_000)

    def test_memory(self):
        # The 256 MiB that xz may take for its dictionary are too much here.
        store = self.make_store(memory_bytes=200 * MIB)
        data = subprocess.run(
            ['xz', '--lzma2=dict=192MiB', '-c'], check=True,
            input=tarballs.system().bytes(), stdout=subprocess.PIPE).stdout
        self.load(data)
        self.refuse('image_too_large', 'memory', data, store=store)

    def test_disk_of_the_flavor(self):
        self.refuse('image_too_large', "'big'.*flavor", tarballs.system()
                    .add('big', bytes(MIB)).bytes(), max_bytes=MIB)

    def test_full_disk(self):
        directory = self.base / 'small'
        directory.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', self.marker,
                        directory], check=True)
        self.addCleanup(subprocess.run, ['umount', directory], check=True)
        image = tarballs.system().add('big', bytes(3 * MIB)).bytes()

        def while_another_fills_it():
            yield image[:2 * MIB]
            wait_for(lambda: list(directory.glob(
                'layers/.staging/*/root/big')), 'the large file')
            with contextlib.suppress(OSError), open(
                    directory / 'other', 'wb', buffering=0) as f:
                while f.write(bytes(4096)) == 4096:
                    pass
            yield image[2 * MIB:]

        for least, data, text in (
            (2 * MIB, image, 'nearly full'),
            (0, while_another_fills_it(), 'is full.*No space left'),
        ):
            store = self.make_store(
                directory=directory / 'layers', min_free_bytes=least)
            self.refuse('no_space', text, data, store=store)
            self.assertEqual({'.locks', '.staging'},
                             set(os.listdir(directory / 'layers')))
        (directory / 'other').unlink()
        self.load(image, store=store)

    def test_file_system_without_idmapped_mounts(self):
        # Overlay's own is one (as of Linux 6.18).
        parts = [self.base / name for name in ('l', 'u', 'w', 'merged')]
        for part in parts:
            part.mkdir()
        lower, upper, work, merged = parts
        subprocess.run(
            ['mount', '-t', 'overlay', '-o', f'lowerdir={lower},'
             f'upperdir={upper},workdir={work}', self.marker, merged],
            check=True)
        self.addCleanup(subprocess.run, ['umount', merged], check=True)
        store = self.make_store(directory=merged / 'layers')
        self.refuse('unsupported', 'idmapped', tarballs.system().bytes(),
                    store=store)


class TestStore(layers_base.Case):

    def test_delete(self):
        info = self.load(tarballs.system().bytes())
        self.used.add(info.key)
        error = self.assertRaises(
            errors.ContainerError, self.store.delete, info.key)
        self.assertEqual('layer_in_use', error.code)
        self.assertEqual(info, self.store.get(info.key))
        self.used.clear()
        self.store.delete(info.key)
        self.store.delete(info.key)
        self.assertIsNone(self.store.get(info.key))
        self.assertEqual({'.locks', '.staging'},
                         set(os.listdir(self.layers)))

    def test_recover_after_a_kill_in_delete(self):
        info = self.load(tarballs.system().bytes())
        (self.layers / info.key).rename(
            self.layers / '.staging' / f'{info.key}.dead')
        self.store.recover()
        self.assertEqual([], self.store.list())

    def test_layer_of_another_format(self):
        info = self.load(tarballs.system().bytes())
        path = self.layers / info.key / 'layer.json'
        path.write_text(json.dumps({**info.to_dict(), 'format': 2}))
        error = self.assertRaises(
            errors.ContainerError, self.store.get, info.key)
        self.assertIn('upgrade', str(error))
        self.store.recover()
        self.assertTrue(path.exists())
        self.assertEqual([], self.store.list())

    def test_damaged_description(self):
        info = self.load(tarballs.system().bytes())
        path = self.layers / info.key / 'layer.json'
        for text in ('', '[]', '{"format": 1}', 'x'):
            path.write_text(text)
            error = self.assertRaises(
                errors.ContainerError, self.store.get, info.key)
            self.assertEqual('internal', error.code)
        self.store.delete(info.key)
