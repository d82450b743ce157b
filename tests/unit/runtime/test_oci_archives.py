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

"""Archives of container layers: what becomes of them, and of wrong ones."""

import json
import os
import stat
import struct

import ddt
import fixtures

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import imageplatform
from tests import ocibad
from tests import ociimages
from tests import tarballs
from tests.unit.runtime import test_archive

HERE = ociimages.HERE
LIMITS = test_archive.LIMITS
SYSTEM = tarballs.system().bytes()


class Case(test_archive.Case):

    def load(self, data, **kw):
        """Unpack and return the result; the root is then ``self.root``."""
        result = self.unpack(data, **kw)
        self.assertTrue(result.nested)
        name, = os.listdir(self.root)
        self.root /= name
        return result

    def read(self, name):
        return (self.root / name).read_bytes()


def tree_of(root, prefix=''):
    """Path → content of a file, None of a directory, text of a link."""
    found = {}
    for entry in os.scandir(os.path.join(root, prefix)):
        name = os.path.join(prefix, entry.name)
        if entry.is_symlink():
            found[name] = os.readlink(entry.path)
        elif entry.is_dir():
            found[name] = None
            found |= tree_of(root, name)
        else:
            with open(entry.path, 'rb') as f:
                found[name] = f.read()
    return found


@ddt.ddt
class TestBad(Case):

    @ddt.data(*sorted(ocibad.BAD))
    def test_refused(self, name):
        image, code, text = ocibad.BAD[name]
        (self.outside / 'outside').mkdir()
        (self.outside / 'outside' / 'sentinel').write_bytes(b'x')
        self.refuse(image, code, text)
        self.assertEqual({'root', 'outside'}, {*os.listdir(self.outside)})
        self.assertEqual(
            ['sentinel'], os.listdir(self.outside / 'outside'))
        self.assertFalse(list(self.root.rglob('*evil*')))


@ddt.ddt
class TestKinds(Case):

    def check(self, data):
        layers, tree = ociimages.split_system()
        result = self.load(data)
        found = tree_of(self.root)
        self.assertEqual(tree | {
            name: found.get(name) for name, content in tree.items()
            if content is ...}, found)
        self.assertEqual(0o711, stat.S_IMODE(self.root.stat().st_mode))
        self.assertEqual(0o700, stat.S_IMODE(
            (self.root / 'opaque').stat().st_mode))
        self.assertEqual([], os.listxattr(self.root / 'opaque'))
        self.assertEqual(1, (self.root / 'replaced').stat().st_nlink)
        self.assertEqual({
            'records of AUFS': 3, 'device nodes under dev/': 1},
            result.notes)
        # What is really there, in blocks.
        self.assertEqual(sum(
            4096 for name, content in found.items()
            if name != 'also' and not isinstance(content, str)) + 4096,
            result.bytes)

    @ddt.data(*ociimages.PACKERS)
    def test_oci(self, packer):
        self.check(ociimages.oci(
            *ociimages.split_system()[0], packer=packer))

    @ddt.data('old', 'podman', 'linked')
    def test_docker(self, style):
        self.check(ociimages.docker(
            *ociimages.split_system()[0], style=style))

    @ddt.data(*tarballs.PACKERS)
    def test_packed(self, packer):
        self.check(tarballs.PACKERS[packer](ociimages.oci(
            *ociimages.split_system()[0])))

    def test_packed_layers_of_docker(self):
        self.check(ociimages.docker(
            *ociimages.split_system()[0], packer='tar+gzip'))

    def test_order_of_the_archive(self):
        layout = ociimages.Layout()
        layout.top(layout.image(
            [layer.bytes() for layer in ociimages.split_system()[0]]))
        self.check(layout.bytes(reverse=True))

    def test_docker_of_today(self):
        """Both kinds in one archive; the one with digests is read."""
        layout = ociimages.Layout()
        layout.top(layout.image([SYSTEM]))
        self.load(ociimages.pack(layout.files | {
            'manifest.json': b'[{"Config": "none", "Layers": []}]',
            'blobs': None, 'repositories': b'{}'}))
        self.assertIn('usr/sbin/init', self.tree())

    def test_media_types_of_docker(self):
        docker = ociimages.DOCKER
        layout = ociimages.Layout()
        image = layout.image([SYSTEM], change=lambda blobs: blobs[0].update(
            mediaType=f'{docker}image.rootfs.diff.tar.gzip'), manifest={
                'mediaType': f'{docker}distribution.manifest.v2+json'})
        self.load(layout.top(layout.nest(image | {
            'mediaType': f'{docker}distribution.manifest.v2+json',
            'platform': HERE}) | {
                'mediaType': f'{docker}distribution.manifest.list.v2+json'}
        ).bytes())

    def test_digests_of_sha512(self):
        layout = ociimages.Layout()
        layer = layout.blob(SYSTEM, f'{ociimages.OCI}layer.v1.tar', 'sha512')
        self.load(layout.top(layout.image(
            [SYSTEM], change=lambda blobs: blobs.__setitem__(0, layer))
        ).bytes())

    def test_layer_that_occurs_twice(self):
        again = tarballs.Tar().add('f', b'x').bytes()
        gone = tarballs.Tar().add('.wh.f').bytes()
        self.load(ociimages.oci(SYSTEM, again, gone, again, bytes(1024)))
        self.assertEqual(b'x', self.read('f'))

    def test_names_of_the_archive_are_no_names_of_the_image(self):
        layout = ociimages.Layout()
        layout.files |= {'root0': b'x', 'root1/x': b'x'}
        self.load(layout.top(layout.image([tarballs.system().add(
            'oci-layout', b'mine').dir('blobs').bytes()])).bytes())
        self.assertEqual(b'mine', self.read('oci-layout'))
        self.assertEqual([], os.listdir(self.root / 'blobs'))
        self.assertNotIn('root0', self.tree())

    def test_root_tarball_with_such_names(self):
        result = self.unpack(tarballs.system().add(
            'oci-layout', b'{}').add('manifest.json', b'[]').bytes())
        self.assertFalse(result.nested)
        self.assertIn('manifest.json', self.tree())


class TestPlatforms(Case):

    def choose(self, *platforms, nested=False):
        """Unpack an archive of images that say which they are."""
        layout = ociimages.Layout()
        images = []
        for number, (of_index, own) in enumerate(platforms):
            image = layout.image(
                [tarballs.Tar().add('which', b'%d' % number).bytes()],
                on=own)
            images.append(image | (
                {'platform': of_index} if of_index else {}))
        if nested:
            images = [layout.nest(*images), images[0]]
        self.load(layout.top(*images).bytes())
        return int(self.read('which'))

    def test_by_the_index(self):
        self.assertEqual(1, self.choose(
            (ociimages.ELSEWHERE, ociimages.ELSEWHERE), (HERE, HERE)))

    def test_by_the_configuration(self):
        self.assertEqual(1, self.choose(
            (None, ociimages.ELSEWHERE), (None, HERE), nested=True))

    def test_what_is_for_others_need_not_be_there(self):
        layout = ociimages.Layout()
        other = layout.image([b'x'], on=ociimages.ELSEWHERE)
        attestation = layout.image([b'y'], on=HERE)
        layout.files = {'oci-layout': layout.files['oci-layout']}
        image = layout.image([SYSTEM])
        self.load(layout.top(layout.nest(
            other | {'platform': ociimages.ELSEWHERE},
            image | {'platform': HERE},
            attestation | {'platform': {
                'os': 'unknown', 'architecture': 'unknown'}})).bytes())

    def test_the_same_image_by_two_names(self):
        layout = ociimages.Layout()
        image = layout.image([SYSTEM])
        self.load(layout.top(*[
            image | {'annotations': {'org.opencontainers.image.ref.name': n}}
            for n in 'ab']).bytes())

    def test_variants(self):
        machine = os.uname()
        for name, architecture, better, worse, foreign in (
            ('aarch64', 'arm64', 'v8', None, 'v9'),
            ('armv7l', 'arm', 'v7', 'v6', 'v8'),
            ('x86_64', 'amd64', None, 'v1', 'v3'),
        ):
            fake = os.uname_result((*machine[:4], name))
            self.useFixture(fixtures.MonkeyPatch(
                'os.uname', lambda fake=fake: fake))
            ranks = [imageplatform.rank({
                'os': 'linux', 'architecture': architecture,
                'variant': variant}) for variant in (better, worse, foreign)]
            self.assertEqual(f'linux/{architecture}', imageplatform.host())
            self.assertLess(ranks[0], ranks[1])
            self.assertIsNone(ranks[2])


@ddt.ddt
class TestLayers(Case):

    def test_directory_keeps_what_is_in_it(self):
        tar = tarballs.Tar
        self.load(ociimages.oci(
            tar().dir('d', mtime=1, pax={
                'SCHILY.xattr.user.a': '1', 'SCHILY.xattr.user.b': '1',
                'SCHILY.acl.access': 'user::rwx,user:7:r--,group::r--,'
                'mask::r--,other::---'}).add('d/f', b'x'),
            tar().dir('d', mode=0o750, mtime=2,
                      pax={'SCHILY.xattr.user.a': '2'})))
        self.assertEqual(b'x', self.read('d/f'))
        self.assertEqual(['user.a'], os.listxattr(self.root / 'd'))
        self.assertEqual(b'2', os.getxattr(self.root / 'd', 'user.a'))
        status = (self.root / 'd').stat()
        self.assertEqual((0o750, 2), (
            stat.S_IMODE(status.st_mode), status.st_mtime))

    def test_lists_of_what_is_gone(self):
        tar = tarballs.Tar
        acl = {'SCHILY.acl.access': 'user::rw-,user:7:r--,group::r--,'
               'mask::r--,other::---'}
        self.load(ociimages.oci(
            tar().add('a', b'x', pax=acl).add('b', b'x', pax=acl)
            .add('d/c', b'x', pax=acl).add('kept', b'x', pax=acl),
            tar().add('a', b'y').add('.wh.b').add('.wh.d'),
            tar().add('b', b'y').add('d/c', b'y')))
        for name in ('a', 'b', 'd/c'):
            self.assertEqual([], os.listxattr(self.root / name), name)
        self.assertEqual((2, 4, 7), struct.unpack_from('<HHI', os.getxattr(
            self.root / 'kept', 'system.posix_acl_access'), 12))

    @ddt.data(True, False)
    def test_whiteout_of_a_directory_that_is_made_again(self, first):
        tar = tarballs.Tar()
        for hide in (first, not first):
            if hide:
                tar.add('a/.wh.d')
            else:
                tar.add('a/d/new', b'x').add('a/d/e/new', b'x')
        self.load(ociimages.oci(
            tarballs.Tar().dir('a').dir('a/d').add('a/d/old', b'x')
            .add('a/d/e/old', b'x'), tar))
        self.assertEqual(
            ['a', 'a/d', 'a/d/e', 'a/d/e/new', 'a/d/new'], self.tree())

    def test_opaque_root(self):
        self.load(ociimages.oci(SYSTEM, tarballs.Tar().add('f', b'x').add(
            '.wh..wh..opq')))
        self.assertEqual(['f'], self.tree())

    def test_whiteout_of_a_link_leaves_its_target(self):
        self.load(ociimages.oci(
            tarballs.Tar().dir('d').add('d/f').symlink('l', 'd'),
            tarballs.Tar().add('.wh.l')))
        self.assertEqual(['d', 'd/f'], self.tree())

    @ddt.data('.wh.sentinel', '.wh..wh..opq')
    def test_whiteout_below_what_has_come_in_its_place(self, name):
        """As umoci writes it: one for all that was in the directory."""
        outside = self.outside / 'outside'
        outside.mkdir()
        (outside / 'sentinel').write_bytes(b'x')
        self.load(ociimages.oci(
            tarballs.Tar().add('d/sentinel').add('e/sentinel'),
            tarballs.Tar().symlink('d', '../../outside').add(f'd/{name}')
            .add('e', b'x').add(f'e/{name}')))
        self.assertEqual(['d', 'e'], self.tree())
        self.assertEqual(['sentinel'], os.listdir(outside))

    def test_hard_link_and_what_it_was_linked_with(self):
        result = self.load(ociimages.oci(
            tarballs.Tar().add('a', b'x' * 5000),
            tarballs.Tar().link('b', 'a').link('c', 'a'),
            tarballs.Tar().add('.wh.a').add('c', b'y')))
        self.assertEqual(['b', 'c'], self.tree())
        self.assertEqual(b'x' * 5000, self.read('b'))
        self.assertEqual(8192 + 4096, result.bytes)

    def test_write_through_a_link_stays_in_the_root(self):
        self.load(ociimages.oci(
            tarballs.Tar().dir('d').add('d/f').dir('etc'),
            tarballs.Tar().symlink('d', '/'),
            tarballs.Tar().add('d/etc/evil', b'x')))
        self.assertEqual(b'x', self.read('etc/evil'))
        self.assertFalse(os.path.lexists('/etc/evil'))

    def test_names_that_only_look_like_whiteouts(self):
        self.load(ociimages.oci(tarballs.Tar().add('a.wh.b').add('.whx')))
        self.assertEqual(['.whx', 'a.wh.b'], self.tree())


class TestLimits(Case):

    def test_entries_of_archive_and_layers_count_together(self):
        image = ociimages.oci(
            tarballs.Tar().add('a').add('b'), tarballs.Tar().add('c'))
        limits = archive.Limits(min_free_bytes=0, entries=11)
        # Of the archive: 2 files, 2 directories, 4 blobs.
        self.assertEqual(3, self.load(image, limits=limits).entries)
        self.root = self.outside / 'again'
        self.root.mkdir()
        limits = archive.Limits(min_free_bytes=0, entries=10)
        self.refuse(image, 'image_too_many_entries', "'c'", limits=limits)

    def test_disk_is_what_is_left_of_the_layers(self):
        big = tarballs.NOISE
        image = ociimages.oci(*[
            tarballs.Tar().add(f'f{n % 2}', big + bytes([n]))
            for n in range(6)])
        size = -(-len(big) // 4096) * 4096 * 2
        # The archive has all of them.
        result = self.load(image, max_bytes=4 * size)
        self.assertEqual(size, result.bytes)

    def test_disk_of_the_flavor(self):
        data = bytes(1 << 20)
        image = ociimages.oci(*[
            tarballs.Tar().add(f'f{n}', data + bytes([n]))
            for n in range(3)])
        self.refuse(image, 'image_too_large', "layer 3 of 3|'f2'.*flavor",
                    max_bytes=3 << 20)

    def test_disk_of_both_at_once(self):
        """The archive and what is made of it, within the host's limit."""
        image = ociimages.oci(
            tarballs.Tar().add('a', tarballs.NOISE),
            tarballs.Tar().add('b', bytes(tarballs.NOISE)), packer='tar')
        need = 2 * 200_704  # of what is made
        for size, fits in ((need + 300_000, True), (need + 150_000, False)):
            limits = archive.Limits(min_free_bytes=0, bytes=size)
            self.root = self.outside / str(size)
            self.root.mkdir()
            if fits:
                self.load(image, limits=limits, max_bytes=size)
            else:
                self.refuse(image, 'image_too_large', '', limits=limits,
                            max_bytes=size)

    def test_holes_that_are_removed_give_back_what_they_took(self):
        holes = {'GNU.sparse.major': '0', 'GNU.sparse.minor': '1',
                 'GNU.sparse.size': str(1 << 20),
                 'GNU.sparse.map': '8192,512'}
        layer = tarballs.Tar()
        for n in range(5):
            layer.add(f'f{n}', b'x' * 512, pax=holes)
        result = self.load(ociimages.oci(
            layer, tarballs.Tar().add('.wh.f1').add('.wh.f2').add('f0')))
        self.assertEqual(2 * 4096, result.bytes)

    def test_bomb(self):
        zeros = tarballs.Tar().add('f', bytes(8 << 20))
        limits = archive.Limits(
            min_free_bytes=0, ratio=20, ratio_floor=1 << 20)
        for packer in ('tar+gzip', 'tar+zstd'):
            self.refuse(
                ociimages.oci(zeros, packer=packer), 'image_too_large',
                'layer 1 of 1.*|times its size', limits=limits)
        self.refuse(ociimages.docker(zeros, packer='tar+gzip'),
                    'image_too_large', 'times its size', limits=limits)

    def test_large_document_within_a_digest(self):
        layout = ociimages.Layout()
        image = layout.image([SYSTEM], manifest={
            'annotations': {'x': 'y' * (4 << 20)}})
        self.refuse(layout.top(image).bytes(), 'image_too_large', 'metadata')

    def test_many_platforms_in_a_message(self):
        layout = ociimages.Layout()
        error = self.refuse(layout.top(*[
            {'mediaType': ociimages.MANIFEST, 'size': 1,
             'digest': f'sha256:{n:064x}',
             'platform': {'os': 'x' * 900, 'architecture': str(n)}}
            for n in range(500)]).bytes(), 'image_wrong_arch')
        self.assertLess(len(json.dumps(error.to_dict())), 3000)
