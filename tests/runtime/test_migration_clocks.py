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

"""Whoever waits for a time in a guest that moves: never woken early.
"""

import base64
import json
import pathlib
import struct
import time

from nova_pycontainer.runtime import criu
from tests.runtime import base
from tests.runtime import hosts

PROGRAM = pathlib.Path(__file__).with_name('guest_clocks.py')
#: An early end of less than this is the clocks' own.
EARLY = 0.001
#: What a loaded machine may add to the time that the guest stands still, be
#: it in the migration or because others run: its watcher has measured that.
LATE = 1.5
#: Results of the calls that are not 0: FUTEX_WAIT ends by its time-out.
RESULTS = {'futex_absolute': ['ETIMEDOUT'],
           # "As if woken" if its time is over while the guest stands still.
           'futex_relative': ['ETIMEDOUT', 0],
           'poll_pipe': [1], 'epoll_wait': [[0, 0]],
           'epoll_endless': [[1, 0]]}
SECONDS = 12


class Waiting(hosts.TwoHostsTestCase):

    def boot(self):
        # Without a network its boot waits for one.
        self.dhcp()
        uuid = self.run_container('debian13', memory=512, nics=[{
            'id': '0123456789b-x', 'devname': 'tap0123456789b',
            'mac': 'fa:16:3e:00:00:33', 'mtu': 1500, 'tx_offload': True}])
        base.wait_for(
            lambda: self.sh(self.a, uuid, 'systemctl is-system-running || :')
            in ('running', 'degraded'), 'systemd', 240)
        encoded = base64.b64encode(PROGRAM.read_bytes()).decode()
        self.sh(self.a, uuid,
                f'echo {encoded} | base64 -d > /root/waits.py')
        return uuid

    def start(self, host, uuid, name, seconds):
        self.sh(host, uuid, f'systemd-run --unit={name} -q '
                f'python3 /root/waits.py /root/{name} {seconds}')
        base.wait_for(lambda: self.sh(
            host, uuid, f'ls /root/{name}/started || :'), 'the program')
        # All sleep now.
        time.sleep(1)

    def results(self, host, uuid, name, count):
        def read():
            text = self.sh(
                host, uuid, f'cd /root/{name} && for f in $(ls); do '
                '[ $f = started ] || (echo "$f $(cat $f)"); done')
            lines = [line.partition(' ')[::2] for line in text.splitlines()]
            found = {n: json.loads(v) for n, v in lines if '.new' not in n}
            return found if len(found) == count else None

        return base.wait_for(read, 'the ends')

    def check(self, found, frozen, interrupted=False):
        """:param interrupted: all was stopped by something else, too"""
        watched = found.pop('watch_clocks')
        self.assertEqual([], watched['result']['back'])
        print(f'frozen {frozen:.3f} s; the clocks went on by', watched[
            'result']['longest'])
        late = max(frozen, watched['result']['stood']) + LATE
        wrong = {}
        for name, end in sorted(found.items()):
            off = end['ended'] - end['wanted']
            if interrupted and 'epoll' in name:
                end['result'][1] = 0
            print(f'  {name:26} {off:+.4f} s  {end["result"]}')
            if not -EARLY <= off <= late or (
                    end['result'] not in RESULTS.get(name, [0])):
                wrong[name] = (off, end['result'])
        self.assertEqual({}, wrong)


class WaitingTestCase(Waiting):

    @property
    def messages(self):
        return criu.Criu(base.tool('criu'), None).messages()

    def _host(self, name, address):
        host = super()._host(name, address)
        host.faults = self.faults.get(self._testMethodName, '').format(
            top=self.top)
        host.record = self.top / f'points-{name}'
        return host

    #: An image is changed between its arrival and the restore.
    faults = {'test_another_uptime': 'destination.images=wait:{top}/go',
              'test_given_up': 'destination.restored=raise'}

    def test_one_move(self):
        uuid = self.boot()
        self.start(self.a, uuid, 'one', SECONDS)
        source, destination = self.migrate(uuid, self.a, self.b)
        print(source['steps'], destination['steps'])
        found = self.results(self.b, uuid, 'one', 22)
        self.check(found, source['frozen'])

    def test_two_moves_and_a_pause(self):
        uuid = self.boot()
        self.start(self.a, uuid, 'two', SECONDS)
        first, _ = self.migrate(uuid, self.a, self.b)
        self.b.pause(uuid)
        self.b.unpause(uuid)
        second, _ = self.migrate(uuid, self.b, self.a)
        found = self.results(self.a, uuid, 'two', 22)
        self.check(found, first['frozen'] + second['frozen'],
                   interrupted=True)

    def test_given_up(self):
        """The destination fails after everything was dumped: whoever sleeps
        on the source sleeps on.
        """
        uuid = self.boot()
        self.start(self.a, uuid, 'stays', SECONDS)
        migration = self.prepare_migration(uuid, self.a, self.b)
        status = base.wait_for(
            lambda: self._ended(self.a, migration), 'the end')
        self.assertEqual('failed', status['phase'])
        found = self.results(self.a, uuid, 'stays', 22)
        # How long it stood still, nobody has said but its own clock.
        watched = found['watch_clocks']['result']['longest']
        self.check(found, watched['1'])
        # And it can move still.
        self.migrate(uuid, self.a, self.b)

    def test_another_uptime(self):
        """The hosts of the tests have one kernel, so one uptime: the image
        is changed as if the guest came from a host that is up for longer.
        """
        shift = 1_000_000
        uuid = self.boot()
        self.start(self.a, uuid, 'up', SECONDS + 6)
        began = time.monotonic()
        before = self.uptimes(self.a, uuid)
        migration = self.prepare_migration(uuid, self.a, self.b)
        images = pathlib.Path(f'/proc/{self.b.pid}/root/run/pyc/migration',
                              migration)
        base.wait_for(
            lambda: self.b.record.exists() and 'destination.images' in
            self.b.record.read_text().split(), 'the images')
        path, = images.glob('timens-*.img')
        data = path.read_bytes()
        entry = self.messages.timens_entry()
        entry.ParseFromString(data[12:])
        for clock in entry.monotonic, entry.boottime:
            clock.tv_sec += shift
        changed = entry.SerializeToString()
        path.write_bytes(
            data[:8] + struct.pack('<I', len(changed)) + changed)
        # The way back does not wait.
        (self.top / 'go').touch()
        first, _ = self.finish_migration(uuid, migration, self.a, self.b)
        jumped = self.uptimes(self.b, uuid)
        # Now it is as if it had come from there, and goes on to a host that
        # is up for a shorter time.
        self.start(self.b, uuid, 'other', SECONDS)
        second, _ = self.migrate(uuid, self.b, self.a)
        after = self.uptimes(self.a, uuid)
        took = time.monotonic() - began
        for i in range(2):
            self.assertLess(before[i] + shift, jumped[i])
            self.assertLess(jumped[i], after[i])
            self.assertLess(after[i], before[i] + shift + took + 10)
        found = self.results(self.a, uuid, 'other', 22)
        self.check(found, second['frozen'])

    def uptimes(self, host, uuid):
        return [float(n) for n in self.sh(
            host, uuid, 'python3 -c "import time; print('
            'time.clock_gettime(1), time.clock_gettime(7))"').split()]

    def expiry(self):
        """When the DHCP server's lease ends, in seconds since the epoch."""
        try:
            return int((self.top / 'leases').read_text().split()[0])
        except (OSError, IndexError):
            return 0

    def renewed(self, before):
        base.wait_for(lambda: self.expiry() > before, 'the renewal')

    def test_lease_is_renewed_on_time(self):
        """systemd-networkd renews after half of a lease's two minutes, by an
        absolute timer. If that fired early it would never do so.
        """
        uuid = self.boot()
        here, there = self.a, self.b
        for _ in range(2):
            # A request that falls into a move may be lost, and is sent again
            # much later: there has to be time enough for one.
            if self.expiry() - 60 - time.time() < 30:
                self.renewed(self.expiry())
            address, before = self.lease(), self.expiry()
            self.migrate(uuid, here, there)
            here, there = there, here
            self.renewed(before)
            # The new lease began when half of the old one was over.
            late = self.expiry() - 120 - (before - 60)
            print('renewed', late, 's late')
            self.assertLess(late, 10)
            self.assertEqual(address, self.lease())
            self.assertIn(address, self.sh(
                here, uuid, 'networkctl status eth0'))
