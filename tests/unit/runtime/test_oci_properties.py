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

"""Whatever layers and their lists say: it is done by the rules, or refused,
and nothing happens outside of the root.
"""

import json
import os
import pathlib
import tarfile
import tempfile

import hypothesis
from hypothesis import strategies as st
import testtools

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import ociarchive
from nova_pycontainer.runtime import unpack
from tests import ocibad
from tests import ociimages
from tests import tarballs
from tests.unit.runtime import test_archive_properties
from tests.unit.runtime import test_oci_archives
from tests.unit import test_fuzz

LIMITS = archive.Limits(min_free_bytes=0, entries=300, file_bytes=1 << 20)
CODES = test_archive_properties.CODES | {
    code for _, code, _ in ocibad.BAD.values()}

_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
    st.sampled_from([
        '', '..', '/etc/passwd', '../x', 'linux', ociimages.ARCHITECTURE,
        ociimages.INDEX, ociimages.MANIFEST, ociimages.CONFIG,
        f'{ociimages.OCI}layer.v1.tar', f'sha256:{"0" * 64}',
        'sha256:../../x', 2, -1, 1 << 70]))
_JSON = st.recursive(_LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(st.sampled_from([
        'schemaVersion', 'manifests', 'mediaType', 'digest', 'size', 'layers',
        'config', 'platform', 'os', 'architecture', 'rootfs', 'diff_ids',
        'urls', 'Config', 'Layers', 'variant']), inner, max_size=6)),
    max_leaves=15)


def _with(value, path, new):
    """A JSON value with another one somewhere in it."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    keys = [*value] if isinstance(value, dict) else [*range(len(value))]
    key = keys[path[0] % len(keys)]
    value = value.copy()
    value[key] = _with(value[key], path[1:], new)
    return value


_CHANGE = st.tuples(st.lists(st.integers(0, 9), max_size=4), _JSON)


class TestLists(testtools.TestCase):

    def check(self, files):
        with tempfile.TemporaryDirectory(prefix='oci-test-') as directory:
            for name, data in files.items():
                path = pathlib.Path(directory, name)
                path.parent.mkdir(exist_ok=True, parents=True)
                path.write_bytes(data)
            fd = os.open(directory, os.O_RDONLY)
            try:
                for layer in ociarchive.layers(fd, LIMITS):
                    self.assertIsInstance(layer, ociarchive.Layer)
                    self.assertFalse({b'..', b''} & {
                        *layer.path.split(b'/')})
            except errors.ContainerError as e:
                self.assertIn(e.code, CODES)
                self.assertTrue(e.remedy)
                self.assertTrue(str(e).isprintable())
                self.assertLess(len(str(e)), 3000)
            finally:
                os.close(fd)

    @test_fuzz.SETTINGS
    @hypothesis.given(_CHANGE, _CHANGE, _CHANGE, st.booleans())
    def test_layout(self, index, manifest, config, all_of_it):
        layout = ociimages.Layout()
        layer = tarballs.Tar().add('f').bytes()
        layout.image([layer])
        # Each one is known by the digest that it really has.
        if all_of_it:
            layout.config = _with(layout.config, *config)
            layout.manifest = _with(layout.manifest | {
                'config': layout.blob(layout.config, ociimages.CONFIG)},
                *manifest)
        layout.top(layout.blob(layout.manifest, ociimages.MANIFEST))
        layout.files['index.json'] = json.dumps(_with(json.loads(
            layout.files['index.json']), *index)).encode()
        self.check(layout.files)

    @test_fuzz.SETTINGS
    @hypothesis.given(_CHANGE)
    def test_docker(self, change):
        files = ociimages.docker_files(
            tarballs.Tar().add('f'), style='old')
        files['manifest.json'] = json.dumps(_with(json.loads(
            files['manifest.json']), *change)).encode()
        self.check(files)

    @test_fuzz.SETTINGS
    @hypothesis.given(st.binary(max_size=60), st.sampled_from(
        ['oci-layout', 'index.json', 'manifest.json']))
    def test_no_json(self, data, name):
        layout = ociimages.Layout()
        layout.top(layout.image([b'x']))
        self.check(layout.files | {name: data})
        self.check(ociimages.docker_files(b'x', style='old') | {name: data})


_HIDES = st.sampled_from(['.wh.a', '.wh.b', '.wh.c', '.wh..wh..opq', '.wh.',
                          '.wh..', '.wh...', '.wh..wh.plnk'])
_WHITEOUTS = st.builds(
    lambda entry, name: (tarfile.REGTYPE, os.path.join(
        os.path.dirname(entry[1]), name), ''),
    test_archive_properties._ENTRIES, _HIDES)
_LAYERS = st.lists(st.lists(st.one_of(
    test_archive_properties._ENTRIES, test_archive_properties._ENTRIES,
    _WHITEOUTS), max_size=6), min_size=1, max_size=4)

_SHORT = st.sampled_from(['a', 'b', 'c'])
_PATHS = st.lists(_SHORT, min_size=1, max_size=3).map('/'.join)
#: What, where, and with what content.
_CHANGES = st.lists(st.tuples(
    st.sampled_from(['file', 'file', 'dir', 'hide', 'hide', 'opaque']),
    _PATHS, st.binary(min_size=1, max_size=1)), max_size=5)


def _tar(entries):
    tar = tarballs.Tar()
    for kind, name, link in entries:
        tar.add(name, b'data' if kind == tarfile.REGTYPE else b'',
                kind=kind, link=link)
    return tar


def _within(path, top):
    return path == top or path.startswith(f'{top}/')


def _apply(tree, changes):
    """The tree after a layer, as layer.md has it; None if it is no layer.

    First all whiteouts, for they are about what is lower, then the rest.

    :param tree: path → content, or None of a directory
    """
    mine = {}
    for kind, path, content in changes:
        if kind in ('hide', 'opaque'):
            continue
        parts = path.split('/')
        for count in range(1, len(parts)):
            above = '/'.join(parts[:count])
            if mine.setdefault(above, None) is not None:
                return None
        if kind == 'dir' and mine.setdefault(path, None) is not None:
            return None
        if kind == 'file':
            if path in mine and mine[path] is None:
                return None
            mine[path] = content
    tree = dict(tree)
    for kind, path, _ in changes:
        if kind == 'hide':
            tree = {name: content for name, content in tree.items()
                    if not _within(name, path)}
        elif kind == 'opaque':
            tree = {name: content for name, content in tree.items()
                    if not _within(name, path) or name == path}
    for path, content in mine.items():
        above = path
        while above:
            if above in tree and (
                    (tree[above] is None) != (mine[above] is None)):
                tree = {name: content for name, content in tree.items()
                        if not _within(name, above)}
            above = above.rpartition('/')[0]
    return tree | mine


def _as_tar(changes):
    tar = tarballs.Tar()
    for kind, path, content in changes:
        parent, _, name = path.rpartition('/')
        if kind == 'file':
            tar.add(path, content)
        elif kind == 'dir':
            tar.dir(path)
        elif kind == 'hide':
            tar.add(os.path.join(parent, f'.wh.{name}'))
        else:
            tar.add(f'{path}/.wh..wh..opq')
    return tar


class TestLayers(testtools.TestCase):

    def unpack(self, data):
        """Return the tree, or the code of the error."""
        with tempfile.TemporaryDirectory(prefix='oci-test-') as directory:
            fd = os.open(directory, os.O_RDONLY)
            try:
                with tempfile.TemporaryFile() as f:
                    f.write(data)
                    f.seek(0)
                    result = unpack.unpack(f.fileno(), fd, 1 << 20, LIMITS)
                name, = os.listdir(directory)
                tree = test_oci_archives.tree_of(
                    os.path.join(directory, name))
                # No link shares anything here.
                self.assertEqual(4096 * len(tree), result.bytes)
                return tree
            except errors.ContainerError as e:
                return e.code
            finally:
                os.close(fd)

    @test_fuzz.SETTINGS
    @hypothesis.given(st.lists(_CHANGES, min_size=1, max_size=4))
    def test_rules(self, layers):
        tree = {}
        for changes in layers:
            tree = _apply(tree, changes)
            hypothesis.assume(tree is not None)
            # A whiteout below a file is refused, see ocibad.
        hypothesis.assume(any(layers))
        found = self.unpack(ociimages.oci(*map(_as_tar, layers)))
        if found == 'image_unsafe_entry':
            hypothesis.assume(any(
                kind in ('hide', 'opaque') for changes in layers
                for kind, _, _ in changes))
            return
        self.assertEqual(tree, found)

    @test_fuzz.SETTINGS
    @hypothesis.given(_LAYERS, st.sampled_from(['oci', 'docker']))
    def test_nothing_outside_of_the_root_changes(self, layers, kind):
        # It compares all there is around before and after.
        code = test_archive_properties._unpack(
            getattr(ociimages, kind)(*map(_tar, layers)))
        self.assertIn(code, {
            None, 'image_unsafe_entry', 'image_too_large',
            'image_too_many_entries', 'image_not_archive'})

    @test_fuzz.SETTINGS
    @hypothesis.given(
        st.sampled_from(['oci', 'docker']),
        st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 255)),
                 min_size=1, max_size=4))
    def test_damage_gives_an_error_with_a_code(self, kind, flips):
        data = bytearray(getattr(ociimages, kind)(
            tarballs.system().add('f', b'x' * 700),
            tarballs.Tar().add('etc/.wh.os-release'), packer='tar'))
        for at, bits in flips:
            data[at % len(data)] ^= bits
        self.assertIn(test_archive_properties._unpack(data), CODES | {None})
