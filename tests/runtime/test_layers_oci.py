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

"""Archives of container layers on a real kernel: sandbox, store, boot."""

import os
import stat
import subprocess
import uuid as uuidlib

import ddt

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import layers
from tests import ocibad
from tests import ociimages
from tests.runtime import base
from tests.runtime import layers_base
from tests import tarballs

MIB = layers_base.MIB
Tar = tarballs.Tar


@ddt.ddt
class TestImport(layers_base.Case):

    @ddt.data('oci', 'docker')
    def test_root_is_that_of_the_image(self, kind):
        data = getattr(ociimages, kind)(*[
            tarballs.system(uid=0, gid=0).dir('d', uid=1, gid=2)
            .add('d/gone').add('setuid', mode=0o4755, uid=7),
            Tar().add('d/new', uid=65535, gid=33).add('d/.wh.gone')
            .dir('./', mode=0o711, uid=3, gid=4)])
        with self.assertLogs(layers.__name__, 'INFO') as log:
            info = self.load(data)
        self.assertEqual(
            {'.': (3, 4, 0o711), 'd': (1, 2, 0o755),
             'd/new': (65535, 33, 0o644), 'setuid': (7, 0, 0o4755)},
            {name: (s.st_uid, s.st_gid, stat.S_IMODE(s.st_mode))
             for name in ('.', 'd', 'd/new', 'setuid')
             for s in [(info.root / name).lstat()]})
        self.assertEqual(['new'], os.listdir(info.root / 'd'))
        self.assertEqual({'root', 'layer.json'},
                         {*os.listdir(info.root.parent)})
        self.assertEqual(info, self.store.get(info.key))
        self.assertEqual(os.uname().machine, info.arch)
        self.assertEqual(len(data), info.compressed_bytes)
        self.assertIn('test 1.0', log.output[0])

    def test_all_ways_of_change(self):
        parts, tree = ociimages.split_system()
        root = self.load(ociimages.oci(*parts)).root
        for name, content in tree.items():
            path = root / name
            if content is None:
                self.assertTrue(stat.S_ISDIR(path.lstat().st_mode), name)
            elif isinstance(content, str):
                self.assertEqual(content, os.readlink(path))
            elif content is not ...:
                self.assertEqual(content, path.read_bytes(), name)
        self.assertEqual(len(tree), sum(
            len(directories) + len(files)
            for _, directories, files in os.walk(root)))

    @ddt.data(*sorted(ocibad.BAD))
    def test_refused(self, name):
        image, code, text = ocibad.BAD[name]
        self.refuse(code, text, image)
        self.assertEqual({'.locks', '.staging'},
                         {*os.listdir(self.layers)})

    def test_archive_that_a_former_release_has_unpacked(self):
        info = self.load(Tar().add('oci-layouT', b'{}').dir('blobs').bytes())
        (info.root / 'oci-layouT').rename(info.root / 'oci-layout')
        other = self.load(tarballs.system().add('oci-layout', b'{}').bytes())
        self.used.add(info.key)
        self.store.recover()
        self.assertEqual(info, self.store.get(info.key))
        self.used.clear()
        self.store.recover()
        self.assertEqual([other], self.store.list())

    def test_deep_archive(self):
        # More levels than files that the process may have open.
        layout = ociimages.Layout()
        layout.files['/'.join(['x'] * 120)] = b'x'
        deep = '/'.join(['d'] * 120)
        root = self.load(layout.top(layout.image([
            tarballs.system().add(f'{deep}/f').bytes(),
            Tar().add('.wh.d').bytes()])).bytes()).root
        self.assertFalse((root / 'd').exists())

    def test_time(self):
        zeros = Tar().add('f', bytes(64 * MIB)).bytes()
        again = 200
        image = ociimages.oci(
            zeros, change=lambda blobs: blobs.extend(blobs * (again - 1)),
            config={'rootfs': {'diff_ids': [
                f'sha256:{ociimages.sha256(zeros)}'] * again}})
        self.refuse('image_too_large', 'processor time', image,
                    store=self.make_store(cpu_seconds=2))

    def test_memory(self):
        layout = ociimages.Layout()
        image = layout.top(layout.image(
            [tarballs.system().bytes()],
            manifest={'annotations': [[]] * 1_040_000})).bytes()
        self.load(image)
        self.refuse('image_too_large', 'memory', image,
                    store=self.make_store(memory_bytes=88 * MIB))

    def test_full_disk(self):
        directory = self.base / 'small'
        directory.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', self.marker,
                        directory], check=True)
        self.addCleanup(subprocess.run, ['umount', directory], check=True)
        store = self.make_store(directory=directory / 'layers')
        parts = [Tar().add(f'f{n}', bytes([n]) * MIB) for n in range(4)]
        whole = Tar().add('f', bytes(4 * MIB))
        self.refuse('no_space', 'the disk of the layer store',
                    ociimages.oci(whole, packer='tar'), store=store)
        self.assertEqual({'.locks', '.staging'},
                         {*os.listdir(directory / 'layers')})
        # Each layer goes when it is applied, so there is room for the next.
        info = self.load(ociimages.oci(*parts, packer='tar'), store=store)
        store.delete(info.key)
        self.load(ociimages.oci(whole), store=store)


@ddt.ddt
class TestUntrustedAnswers(layers_base.Case):

    @ddt.data(
        '', 'echo x > "$root/file"; ', 'ln -s /etc "$root/link"; ',
        'mkdir "$root/a" "$root/b"; ', 'mkfifo "$root/fifo"; ')
    def test_of_where_the_root_is(self, does):
        python = self.base / 'python'
        python.write_text(
            '#!/bin/sh\ncat > /dev/null\n'
            'root=$(expr "$*" : \'.*"root": "\\([^"]*\\)"\')\n' + does +
            'echo \'{"ok": true, "entries": 1, "bytes": 1, "notes": {}, '
            '"nested": true}\'\n')
        python.chmod(0o755)
        self.refuse('internal', 'left something else', tarballs.NOISE,
                    store=self.make_store(python=str(python)))


@ddt.ddt
class TestBoot(base.HostTestCase):

    def parts(self):
        return ociimages.split_busybox(base.image('busybox').read_bytes())

    def boot(self, data, **more):
        key = f'sha256-{ociimages.sha256(data)}'
        self.addCleanup(self.host.layer_delete, key)
        self.addCleanup(self._delete_all)
        self.host.layer_import(
            key, [data], image='in layers', max_bytes=64 * MIB)
        uuid = str(uuidlib.uuid4())
        self.host.define(uuid, self.spec() | {'layer': key} | more)
        self.host.prepare(uuid)
        self.host.start_container(uuid)
        return uuid

    @ddt.data('oci', 'docker')
    def test_system(self, kind):
        parts = self.parts()
        uuid = self.boot(getattr(ociimages, kind)(*parts))
        self.wait_started(uuid)
        self.assertEqual('0', self.sh(uuid, 'id -u'))
        self.assertEqual(
            'gone gone', self.sh(uuid, 'for i in /junk /etc/junk; do '
                                 'test -e $i || echo gone; done | xargs'))
        # One file by two names, of two layers.
        self.assertEqual(
            *self.sh(uuid, 'stat -c %i /bin/sh /bin/busybox').split())
        self.assertNotEqual('/tmp', self.sh(uuid, 'readlink -f /var'))
        self.sh(uuid, 'echo x > /etc/file; rm /bin/sh')
        self.host.stop(uuid, base.PATIENCE)

    def test_application_without_an_init(self):
        """Its command is not what starts: a server is a whole system."""
        parts = self.parts()
        data = ociimages.oci(
            *parts, Tar(uid=0, gid=0).add('sbin/.wh.init'), config={
                'config': {'Entrypoint': ['/bin/busybox'],
                           'Cmd': ['sleep', '1000']}})
        error = self.assertRaises(errors.ContainerError, self.boot, data)
        self.assertEqual('image_no_init', error.code)
        self.assertIn('pycontainer_init', str(error))

    def test_command_that_the_operator_of_the_image_names(self):
        parts = self.parts()
        uuid = self.boot(ociimages.docker(
            *parts, Tar(uid=0, gid=0).add('sbin/.wh.init')), init={
                'argv': ['/bin/busybox', 'sleep', '1000']})
        self.assertEqual('sleep', self.sh(
            uuid, 'tr "\\0" "\\n" < /proc/1/cmdline | sed -n 2p'))
