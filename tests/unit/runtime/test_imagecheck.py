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

"""Init, architecture and name of an unpacked tree."""

import os
import pathlib
import platform
import tempfile

import testtools

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import imagecheck
from tests import tarballs

MACHINE = platform.machine()
NATIVE = tarballs.elf({'x86_64': 62, 'aarch64': 183}[MACHINE])
FOREIGN = tarballs.elf(22, order=2)


class Case(testtools.TestCase):

    def setUp(self):
        super().setUp()
        directory = tempfile.TemporaryDirectory(prefix='imagecheck-')
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name) / 'root'
        self.root.mkdir()

    def program(self, path, data=NATIVE, mode=0o755):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def link(self, path, target):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def refuse(self, code, text, argv=None):
        error = self.assertRaises(
            errors.ContainerError, imagecheck.check_init, self.root, argv)
        self.assertEqual(code, error.code)
        self.assertIn(text, str(error))
        return error


class TestCheckInit(Case):

    def test_plain(self):
        self.program('sbin/init')
        self.assertEqual('/sbin/init',
                         imagecheck.check_init(self.root, None))

    def test_through_links_of_the_image(self):
        self.program('usr/lib/systemd/systemd')
        self.link('sbin', 'usr/sbin')
        self.link('usr/sbin/init', '/lib/systemd/systemd')
        self.link('lib', 'usr/lib')
        self.assertEqual('/sbin/init',
                         imagecheck.check_init(self.root, None))

    def test_link_out_of_the_image_stays_in_it(self):
        # On this host that path is a program; in the image it is not.
        real = os.path.realpath('/bin/sh')
        self.link('sbin/init', '../../../../../../../..' + real)
        self.refuse('image_no_init', 'no init')
        self.program(real.lstrip('/'), FOREIGN)
        self.refuse('image_wrong_arch', 's390x')

    def test_none(self):
        (self.root / 'sbin').mkdir()
        self.refuse('image_no_init', 'pycontainer_init')

    def test_not_executable(self):
        self.program('sbin/init', mode=0o644)
        self.refuse('image_no_init', 'not executable')

    def test_directory_fifo_and_loop(self):
        (self.root / 'sbin/init').mkdir(parents=True)
        os.mkfifo(self.root / 'init')
        self.link('bin/init', 'init')
        self.refuse('image_no_init', 'no init')

    def test_archive_of_container_layers(self):
        self.program('manifest.json', b'[]', 0o644)
        error = self.refuse('image_no_init', 'docker save')
        self.assertNotIn('pycontainer_init', str(error))

    def test_wrong_architecture(self):
        self.program('sbin/init', FOREIGN)
        self.refuse('image_wrong_arch', f'this host is {MACHINE}')

    def test_32_bit(self):
        self.program('sbin/init', tarballs.elf(3, bits=1))
        self.refuse('image_wrong_arch', 'i686')

    def test_script(self):
        self.program('sbin/init', b'#!/bin/sh -e\nexec x\n')
        self.refuse('image_no_init', "/bin/sh")
        self.program('bin/sh', FOREIGN)
        self.refuse('image_wrong_arch', 's390x')
        self.program('bin/sh')
        self.assertEqual('/sbin/init',
                         imagecheck.check_init(self.root, None))

    def test_script_that_interprets_itself(self):
        self.program('sbin/init', b'#!/sbin/init\n')
        self.assertEqual('/sbin/init',
                         imagecheck.check_init(self.root, None))

    def test_program_of_ones_own(self):
        self.program('opt/app')
        self.assertEqual('/opt/app', imagecheck.check_init(
            self.root, ['/opt/app', '-x']))
        self.refuse('image_no_init', '/opt/none', ['/opt/none'])

    def test_program_by_its_name(self):
        self.program('usr/bin/app')
        self.assertEqual('/usr/bin/app', imagecheck.check_init(
            self.root, ['app']))
        self.refuse('image_no_init', "'none'", ['none'])
        self.refuse('image_no_init', "program 'a\\x00b'", ['a\0b'])


class TestArch(Case):

    def test_without_init(self):
        self.assertIsNone(imagecheck.arch(self.root))
        self.program('bin/sh', b'not a program')
        self.assertIsNone(imagecheck.arch(self.root))
        self.program('bin/bash', tarballs.elf(183))
        self.assertEqual('aarch64', imagecheck.arch(self.root))

    def test_names(self):
        for args, name in (((62,), 'x86_64'), ((3, 1), 'i686'),
                           ((22, 2, 2), 's390x'), ((21, 2, 1), 'ppc64le'),
                           ((243,), 'riscv64'), ((40, 1), 'armv7l'),
                           ((62, 1), 'ELF 32 bit 62')):
            self.program('init', tarballs.elf(*args))
            self.assertEqual(name, imagecheck.arch(self.root))

    def test_unknown_is_let_through(self):
        imagecheck.check_arch(None)
        imagecheck.check_arch(MACHINE)


class TestOsRelease(Case):

    def test_values(self):
        self.program('usr/lib/os-release', b'ID=debian\n# x\nbad line\n'
                     b'VERSION_ID="13"\nNAME=\'A b\'\nOPEN="x\n=y\n'
                     b'E=\x1b[2J\n', 0o644)
        self.link('etc/os-release', '../usr/lib/os-release')
        self.assertEqual({'ID': 'debian', 'VERSION_ID': '13', 'NAME': 'A b'},
                         imagecheck.os_release(self.root))

    def test_none(self):
        self.assertEqual({}, imagecheck.os_release(self.root))

    def test_fifo(self):
        (self.root / 'etc').mkdir()
        os.mkfifo(self.root / 'etc/os-release')
        self.assertEqual({}, imagecheck.os_release(self.root))
