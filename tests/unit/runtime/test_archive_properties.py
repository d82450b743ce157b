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

"""Whatever an archive says, nothing happens outside of the root."""

import os
import pathlib
import tarfile
import tempfile

import hypothesis
from hypothesis import strategies as st
import testtools

from nova_pycontainer.runtime import archive
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import unpack
from tests import tarballs

LIMITS = archive.Limits(min_free_bytes=0, entries=200, file_bytes=1 << 20)
CODES = {code for _, code, _ in tarballs.BAD.values()} | {
    'image_too_many_entries'}

_PARTS = st.sampled_from(
    ['a', 'b', 'c', 'dev', '.', '..', '', 'outside', 'sentinel', 'n' * 256,
     '\0', '\udcff', 'x\n'])
_NAMES = st.builds(
    lambda lead, parts: lead + '/'.join(parts),
    st.sampled_from(['', '', '', '/', './', '../']),
    st.lists(_PARTS, min_size=1, max_size=5))
_FEW = st.builds('/'.join, st.lists(
    st.sampled_from(['a', 'b', 'c', '..']), min_size=1, max_size=4))
_ENTRIES = st.tuples(
    st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE,
                     tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
                     tarfile.CHRTYPE]),
    st.one_of(_FEW, _FEW, _NAMES), st.one_of(_FEW, _NAMES))


def _snapshot(directory):
    """All there is, but the tree that is unpacked into."""
    found = {}
    for where, dirs, files in os.walk(directory):
        if where == str(directory):
            dirs.remove('root')
        for name in dirs + files:
            path = os.path.join(where, name)
            status = os.lstat(path)
            content = b''
            if name in files and not os.path.islink(path):
                content = pathlib.Path(path).read_bytes()
            found[path] = (
                status.st_ino, status.st_mode, status.st_nlink,
                status.st_uid, status.st_mtime_ns, content)
    return found


def _unpack(data):
    """Unpack; return the error's code, or None.

    Any other exception than ContainerError is the test's failure.
    """
    with tempfile.TemporaryDirectory(prefix='archive-test-') as directory:
        directory = pathlib.Path(directory)
        (directory / 'root').mkdir()
        for name in ('a', 'outside'):
            (directory / name).mkdir()
            (directory / name / 'sentinel').write_text('as it was')
        (directory / 'sentinel').write_text('as it was')
        before = _snapshot(directory)
        fd = os.open(directory / 'root', os.O_RDONLY)
        try:
            with tempfile.TemporaryFile() as f:
                f.write(data)
                f.seek(0)
                unpack.unpack(f.fileno(), fd, 1 << 20, LIMITS)
            return None
        except errors.ContainerError as e:
            return e.code
        finally:
            os.close(fd)
            assert _snapshot(directory) == before


class TestProperties(testtools.TestCase):

    @hypothesis.settings(
        max_examples=400, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.lists(_ENTRIES, min_size=1, max_size=12))
    def test_nothing_outside_of_the_root_changes(self, entries):
        tar = tarballs.Tar()
        for kind, name, link in entries:
            tar.add(name, b'data' if kind == tarfile.REGTYPE else b'',
                    kind=kind, link=link)
        code = _unpack(tar.bytes())
        self.assertIn(code, {None, 'image_unsafe_entry', 'image_too_large',
                             'image_too_many_entries'})

    @hypothesis.settings(
        max_examples=300, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(
        st.sampled_from(sorted(tarballs.PACKERS)),
        st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 255)),
                 min_size=1, max_size=8),
        st.integers(0, 20_000))
    def test_damage_gives_an_error_with_a_code(self, packer, flips, cut):
        data = bytearray(tarballs.PACKERS[packer](
            tarballs.system().add('f', b'x' * 700, pax={'a': 'b' * 900})
            .symlink('l', 'f' * 150).bytes()))
        for at, bits in flips:
            data[at % len(data)] ^= bits
        if cut % 3 == 0:
            del data[cut % len(data):]
        self.assertIn(_unpack(data), CODES | {None})

    @hypothesis.settings(deadline=None, database=None, print_blob=True)
    @hypothesis.given(st.text(st.characters(
        codec=None, categories=None), max_size=300))
    def test_components_of_a_name(self, name):
        try:
            name.encode('utf-8', 'surrogateescape')
        except UnicodeEncodeError:
            return  # tarfile makes no such names
        try:
            parts = archive.split_name(name, archive.Limits())
        except errors.ContainerError as e:
            self.assertEqual('image_unsafe_entry', e.code)
            self.assertTrue(str(e).isprintable())
            return
        for part in parts:
            self.assertNotIn(part, (b'', b'.', b'..'))
            self.assertNotIn(b'/', part)
            self.assertNotIn(b'\0', part)
            self.assertLessEqual(len(part), 255)
        self.assertEqual(
            os.path.normpath(os.fsencode(name)) if parts else b'.',
            b'/'.join(parts) or b'.')
