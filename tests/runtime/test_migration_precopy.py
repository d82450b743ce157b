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

import os
import signal
import time

from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime.migration import precopy
from tests.faults import kernel
from tests.runtime import base
from tests.runtime import hosts
from tests.runtime import test_migration_clocks

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
#: Sleeps that a round must not end, each in a main thread: for ever, and for
#: a time. What has ended says so.
_SLEEPER = '''
mkdir /root/ends
sleeper() {
    setsid sh -c "date +%s >/root/ends/$1.began; $2; date +%s >/root/ends/$1"
}
sleeper nanosleep 'sleep 5000' &
sleeper poll 'sleep 5000 | (read -t 4000 x)' &
sleeper short 'sleep SECONDS' &
sleeper loop 'for i in $(seq SECONDS); do sleep 1; done' &
'''
_SLEEP = 40
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


class TrackedTestCase(hosts.TwoHostsTestCase):

    def setUp(self):
        super().setUp()
        lacking = _lacking()
        if lacking is not None:
            self.skipTest(
                f'criu check --feature {precopy.FEATURE}: {lacking}')

    def _host(self, name, address):
        host = super()._host(name, address)
        host.record = self.top / f'points-{name}'
        return host

    def rounds(self):
        """How many have begun."""
        try:
            return self.a.record.read_text().split().count('source.round')
        except FileNotFoundError:
            return 0

    def tell(self):
        """Print how long the guest stood still, as the agent has it."""
        print(*(line for line in self.a.log.read_text().splitlines()
                if 'stood still' in line or 'ahead' in line), sep='\n')


class PreCopyTestCase(TrackedTestCase):

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


class SleepingTestCase(TrackedTestCase):
    """What waits for a time waits on, whatever stops it in between."""

    def sleeper(self):
        uuid = self.run_container()
        self.sh(self.a, uuid, '(' + _SLEEPER.replace(
            'SECONDS', str(_SLEEP)) + ') </dev/null >/dev/null 2>&1')
        base.wait_for(lambda: self.sh(
            self.a, uuid, 'ls /root/ends/*.began | wc -l') == '4',
            'the sleepers')
        # In their calls by then.
        time.sleep(1)
        return uuid

    def ends(self, host, uuid):
        """Name → for how long it slept."""
        lines = self.sh(
            host, uuid, 'cd /root/ends; for f in $(ls | grep -v began); do '
            'echo $f $(cat $f.began $f); done').splitlines()
        return {name: int(ended) - int(began)
                for name, began, ended in map(str.split, lines)}

    def assert_slept(self, host, uuid):
        found = base.wait_for(
            lambda: len(found := self.ends(host, uuid)) >= 2 and found,
            'the ends', _SLEEP + base.PATIENCE)
        self.assertEqual({'loop', 'short'}, set(found), found)
        for name, slept in found.items():
            self.assertGreaterEqual(slept, _SLEEP, name)

    def test_sleeps(self):
        uuid = self.sleeper()
        # However short a round is, another one follows.
        source, _ = self.migrate(
            uuid, self.a, self.b, strategy='pre-copy', max_downtime=0.0)
        self.assertEqual('pre-copy', source['strategy'], self.logs())
        self.tell()
        self.assertGreater(self.rounds(), 1)
        self.assert_slept(self.b, uuid)

    def test_criu_killed(self):
        """Between the freeze and its work. The guest is dumped in one go."""
        go = self.top / 'go'
        self.a.restart_agent(f'source.round=wait:{go}')
        uuid = self.sleeper()
        migration = self.prepare_migration(
            uuid, self.a, self.b, strategy='pre-copy')
        base.wait_for(self.rounds, 'a round')
        for pid in kernel.programs(self.a, 'criu'):
            os.kill(pid, signal.SIGKILL)
        go.touch()
        source, _ = self.finish_migration(uuid, migration, self.a, self.b)
        self.assertEqual('stop-and-copy', source['strategy'])
        self.assertEqual(1, self.rounds())
        self.assert_slept(self.b, uuid)

    def test_agent_killed(self):
        """While the guest is frozen: the next one lets it go on."""
        self.a.restart_agent('source.round=kill')
        uuid = self.sleeper()
        self.prepare_migration(uuid, self.a, self.b, strategy='pre-copy')
        self.a.process.wait(base.PATIENCE)
        self.a.faults = ''
        self.a.start_agent()
        base.wait_for(lambda: not self.b.list(), 'the destination')
        self.assert_slept(self.a, uuid)


class WaitingTestCase(TrackedTestCase, test_migration_clocks.Waiting):

    def test_rounds(self):
        uuid = self.boot()
        self.start(self.a, uuid, 'rounds', test_migration_clocks.SECONDS)
        source, _ = self.migrate(
            uuid, self.a, self.b, strategy='pre-copy', max_downtime=0.0)
        self.tell()
        self.assertGreater(self.rounds(), 1)
        found = self.results(self.b, uuid, 'rounds', 22)
        self.check(found, source['frozen'])
