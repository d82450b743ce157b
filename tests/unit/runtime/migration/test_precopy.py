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


"""When memory is sent ahead, and what a destination makes of it."""

import os
import threading

import testtools

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import bandwidth
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import precopy
from tests.unit.runtime.migration import base

LARGE = precopy.WORTHWHILE


class WantedTestCase(testtools.TestCase):

    def wanted(self, strategy, here=None, there=True, memory=LARGE):
        return precopy.wanted(
            strategy, here=lambda: here, there=there, memory=memory)

    def refused(self, *args, **kwargs):
        error = self.assertRaises(
            errors.ContainerError, self.wanted, *args, **kwargs)
        self.assertEqual('unsupported', error.code)
        return error

    def test_auto(self):
        self.assertTrue(self.wanted('auto'))
        self.assertFalse(self.wanted('auto', memory=LARGE - 1))
        self.assertFalse(self.wanted('auto', here='no dirty pages'))
        self.assertFalse(self.wanted('auto', there=False))

    def test_by_name(self):
        self.assertTrue(self.wanted('pre-copy', memory=0))
        error = self.refused('pre-copy', here='no dirty pages')
        self.assertEqual('no dirty pages', error.cause)
        self.assertIn('Upgrade', self.refused('pre-copy', there=False).remedy)

    def test_others(self):
        for strategy in ('stop-and-copy', 'post-copy'):
            self.assertFalse(self.wanted(strategy))


class ReceivedTestCase(base.ChannelTestCase):

    def setUp(self):
        super().setUp()
        self.expect()
        self.source, self.place = self.dir / 'source', self.dir / 'images'
        self.place.mkdir()
        self.received = precopy.Received(self.place)
        self.progress = []

    def round(self, number, content, given_up=False):
        directory = self.source / str(number)
        directory.mkdir(parents=True)
        (directory / 'pages-1.img').write_bytes(content)
        (directory / 'pagemap-1.img').write_bytes(b'map')
        (directory / 'criu.log').write_bytes(b'the source\'s')
        ours, theirs = self.pair(precopy.ROLE)
        sender = images.Sender(directory, ours, bandwidth.Bandwidth(None))
        sender.start()
        end = threading.Thread(
            target=sender.stop if given_up else sender.finish)
        end.start()
        self.addCleanup(end.join, base.PATIENCE)
        return self.received.take(number, theirs, self.progress.append)

    def invalid(self, call, *args):
        error = self.assertRaises(errors.ContainerError, call, *args)
        self.assertEqual('invalid', error.code)

    def test_rounds(self):
        self.assertEqual(3000 + 3, self.round(1, b'1' * 3000))
        self.assertEqual(20 + 3, self.round(2, b'2' * 20))
        self.received.link('2')
        self.assertEqual(
            b'2' * 20, (self.place / 'parent/pages-1.img').read_bytes())
        self.assertEqual(
            b'1' * 3000,
            (self.place / 'parent/parent/pages-1.img').read_bytes())
        self.assertEqual(['pagemap-1.img', 'pages-1.img'],
                         sorted(os.listdir(self.place / '1')))
        self.assertEqual(3003, max(self.progress))

    def test_dump_that_leads_to_none(self):
        self.round(1, b'1')
        self.received.link(None)
        self.assertEqual([], os.listdir(self.place))

    def test_round_that_is_given_up(self):
        self.round(1, b'1')
        self.assertEqual(0, self.round(2, b'2', given_up=True))
        self.assertEqual([], os.listdir(self.place))
        self.invalid(self.received.link, '1')

    def test_wrong_numbers(self):
        self.invalid(self.received.take, 2, None, self.progress.append)
        self.invalid(self.received.take, 0, None, self.progress.append)
        self.invalid(self.received.link, '1')
        self.invalid(self.received.link, '../..')
        self.round(1, b'1')
        self.invalid(self.received.link, '0')
        self.invalid(self.received.link, 1)
        self.invalid(self.received.take, 1, None, self.progress.append)
