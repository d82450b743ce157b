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

"""Files of lxcfs: which there are, and what becomes of them in a dump."""

import pathlib

import testtools

from nova_pycontainer.runtime import bundle
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import init
from nova_pycontainer.runtime import lxcfs
from nova_pycontainer.runtime.migration import guest


class LxcfsTestCase(testtools.TestCase):

    def test_where_it_is_looked_for(self):
        self.assertEqual(pathlib.Path('/var/lib/lxcfs'),
                         lxcfs.Lxcfs('auto').directory)
        self.assertEqual(pathlib.Path('/srv/x'),
                         lxcfs.Lxcfs('/srv/x').directory)
        self.assertIsNone(lxcfs.Lxcfs('none').directory)

    def test_a_directory_without_it(self):
        # A mount of something else, and no mount.
        for setting in 'none', '/proc', '/nonexistent/lxcfs', '/usr':
            shares = lxcfs.Lxcfs(setting)
            self.assertEqual({}, shares.files())
            error = self.assertRaises(
                errors.ContainerError, shares.require, ['proc/meminfo'])
            self.assertEqual('unsupported', error.code)
            self.assertIn('lxcfs', error.remedy)
            self.assertEqual({}, shares.require([]))

    def test_a_peer_names_another_file(self):
        for name in ('../etc/shadow', 'proc/../../x', '', '/proc/meminfo',
                     'proc/stat'):
            error = self.assertRaises(
                errors.ContainerError, guest.restore_externals,
                {'/proc/meminfo': f'lxcfs:{name}'}, pathlib.Path('/x'), {},
                None, lxcfs.Lxcfs('/proc'))
            self.assertEqual('invalid', error.code)

    def test_names_by_mountinfo(self):
        for kind, root, name in (
                ('fuse.lxcfs', '/proc/meminfo', 'proc/meminfo'),
                ('fuse.lxcfs', '/proc/uptime', None),
                ('fuse.lxcfs', '/', None),
                ('fuse', '/proc/meminfo', None),
                ('proc', '/meminfo', None)):
            self.assertEqual(name, lxcfs.name_of(kind, root))

    def test_what_a_guest_has(self):
        self.assertEqual(
            ['proc/loadavg', 'proc/meminfo'], guest.shares_of({
                '/proc/meminfo': 'lxcfs:proc/meminfo',
                '/dev/null': '/dev/null', '/config-drive': 'config-drive',
                '/proc/loadavg': 'lxcfs:proc/loadavg'}))


class BundleTestCase(testtools.TestCase):

    def make(self, **more):
        return bundle.make(
            uuid='x', hostname='x', root=pathlib.Path('/r'), base_id=65536,
            init=init.Init(init.Kind.OTHER, ['/sbin/init'], {}, None, []),
            cgroups_path='/x', resources={}, **more)

    def test_files_come_after_what_they_cover(self):
        mounts = self.make(shares={
            name: pathlib.Path('/l') / name for name in lxcfs.FILES})['mounts']
        points = [m['destination'] for m in mounts]
        self.assertLess(points.index('/sys'),
                        points.index('/sys/devices/system/cpu/online'))
        self.assertLess(points.index('/proc'), points.index('/proc/meminfo'))
        share = mounts[points.index('/proc/meminfo')]
        self.assertEqual(('bind', '/l/proc/meminfo'),
                         (share['type'], share['source']))
        self.assertIn('ro', share['options'])

    def test_namespaces(self):
        def found(document):
            return {n['type']: n.get('path')
                    for n in document['linux']['namespaces']}

        self.assertIn('user', found(self.make()))
        self.assertNotIn('time', found(self.make()))
        made = found(self.make(joined='/proc/7/ns'))
        self.assertEqual('/proc/7/ns/user', made['user'])
        self.assertEqual('/proc/7/ns/time_for_children', made['time'])
        self.assertEqual({*found(self.make()), 'time'}, {*made})
