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


"""Memory that is sent while the guest runs: where the kernel can tell what
it writes to.
"""

from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime.migration import precopy
from tests.runtime import base
from tests.runtime import hosts

#: Writes to a part of its pages for ever, and knows what is in each.
_WRITER = """
import os, random, signal, time
size, page = SIZE, 4096
random.seed(7)
memory = bytearray(random.randbytes(page) * (size // page))
versions = [0] * (size // page)
view = memoryview(memory)
first = bytes(view[:page])
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
open('/root/ready', 'w').close()
count = 0
while True:
    number = random.randrange(HOT)
    versions[number] += 1
    view[number * page:number * page + 8] = versions[number].to_bytes(8)
    count += 1
    if count % 100 == 0:
        time.sleep(0.01)
    if asked:
        asked.clear()
        wrong = sum(
            bytes(view[n * page:(n + 1) * page]) !=
            (v.to_bytes(8) if v else first[:8]) + first[8:]
            for n, v in enumerate(versions))
        with open('/root/.answer', 'w') as f:
            f.write(f'{wrong} wrong of {len(versions)}, {count > 100}')
        os.rename('/root/.answer', '/root/answer')
"""
_SIZE = 144 * base.MIB
_PAGES = _SIZE // 4096


def _lacking():
    """What the kernel lacks, in CRIU's words; None: nothing."""
    return criu.Criu(base.tool('criu'), None).check(precopy.FEATURE)


class RefusedTestCase(hosts.TwoHostsTestCase):

    def test_kernel_that_tracks_nothing(self):
        if _lacking() is None:
            self.skipTest('this kernel tracks dirty pages; see '
                          'PreCopyTestCase')
        uuid = self.run_container()
        migration = self.prepare_migration(
            uuid, self.a, self.b, strategy='pre-copy')
        base.wait_for(lambda: self._ended(self.a, migration), 'the end')
        error = self.a.migration_status(migration)['error']
        self.assertEqual('unsupported', error['code'])
        self.assertIn('CONFIG_MEM_SOFT_DIRTY', error['remedy'])
        self.sh(self.a, uuid, 'true')
        base.wait_for(lambda: not self.b.list(), 'the destination')


class PreCopyTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        lacking = _lacking()
        if lacking is not None:
            self.skipTest(
                f'criu check --feature {precopy.FEATURE}: {lacking}')

    def writer(self, hot):
        uuid = self.run_container('debian13', memory=1024, init={
            'argv': ['/usr/bin/python3', '-c', _WRITER.replace(
                'SIZE', str(_SIZE)).replace('HOT', str(hot))]})
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /root/ready 2>/dev/null || :'), 'the writer',
            4 * base.PATIENCE)
        return uuid

    def assert_right(self, host, uuid):
        self.sh(host, uuid, 'rm -f /root/answer; kill -USR1 1')
        base.wait_for(lambda: self.sh(
            host, uuid, 'ls /root/answer 2>/dev/null || :'), 'the answer')
        self.assertEqual(f'0 wrong of {_PAGES}, True',
                         self.sh(host, uuid, 'cat /root/answer'))

    def test_there_and_back(self):
        uuid = self.writer(200)
        here, there = self.a, self.b
        for strategy in ('pre-copy', 'auto'):
            source, destination = self.migrate(
                uuid, here, there, strategy=strategy)
            here, there = there, here
            self.assert_right(here, uuid)
            for side in (source, destination):
                self.assertEqual(
                    'pre-copy', side['strategy'],
                    f'{strategy} of {here.info(uuid)["memory_bytes"]} bytes; '
                    f'{self.logs()}')
                # All of it went once, and little of it twice.
                self.assertGreater(side['memory_sent'], _SIZE)
                self.assertLess(side['memory_sent'], 1.5 * _SIZE)
            self.assertIn('rounds', source['steps'])
        self.assertEqual([], there.list())

    def test_guest_that_writes_everywhere(self):
        """The rounds end, and the dump has what they do not."""
        uuid = self.writer(_PAGES)
        source, _ = self.migrate(uuid, self.a, self.b, strategy='pre-copy')
        self.assert_right(self.b, uuid)
        self.assertLess(source['memory_sent'], 10 * _SIZE)

    def test_forced_into_post_copy(self):
        uuid = self.writer(200)
        migration = self.prepare_migration(
            uuid, self.a, self.b, strategy='pre-copy', bandwidth=8 << 20,
            permit_post_copy=True)
        base.wait_for(
            lambda: self.a.migration_status(migration)['memory_sent'] or
            self.b.migration_status(migration)['memory_sent'], 'a round')
        self.a.migration_force_complete(migration)
        source, _ = self.finish_migration(uuid, migration, self.a, self.b)
        self.assertEqual('post-copy', source['strategy'])
        self.assert_right(self.b, uuid)

    def test_aborted_in_a_round(self):
        uuid = self.writer(200)
        for end in (self.a, self.b):
            migration = self.prepare_migration(
                uuid, self.a, self.b, strategy='pre-copy',
                bandwidth=8 << 20)
            base.wait_for(
                lambda m=migration: self.b.migration_status(
                    m)['memory_sent'], 'a round')
            end.migration_abort(migration, 'rolled back')
            base.wait_for(
                lambda m=migration: self._ended(self.a, m), 'the end')
            base.wait_for(lambda: not self.b.list(), 'the destination')
            self.assert_right(self.a, uuid)

    def test_failure_and_another_try(self):
        self.a.restart_agent('source.dumped=raise')
        uuid = self.writer(200)
        with self.assertRaisesRegex(AssertionError, 'injected'):
            self.migrate(uuid, self.a, self.b, strategy='pre-copy')
        self.migrate(uuid, self.a, self.b, strategy='pre-copy')
        self.assert_right(self.b, uuid)
