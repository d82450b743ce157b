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


"""What has to hold when a migration is over, however it has ended."""

import time

from tests import echo
from tests.faults import kernel
from tests.faults import one_host
from tests.runtime import base

#: Seconds in which all is right again when a program was killed: those of an
#: agent count from its next start.
RIGHT_S = 30.0
#: A connection may be silent for as long: TCP doubles the time between two
#: tries, and a guest is frozen for a minute at most.
SILENCE_S = 200.0


class After:
    """A part of :class:`tests.faults.rig.Rig`.

    :ivar settled: seconds until all was right again, where that is measured
    """

    settled = None

    def right(self, fault):
        """It is known where the guest is, and there it is.

        :raises AssertionError: too late
        """
        if not fault.prompt:
            return
        self.settled = round(time.monotonic() - self.restarted, 1)
        if self.settled > RIGHT_S:
            raise AssertionError(
                f'it has taken {self.settled} s until all was right again')

    def _check_runs(self, uuid, verdict):
        here, there = ((self.a, self.b) if verdict == 'source'
                       else (self.b, self.a))
        self.check_busy(here)
        self._exactly_one(here, there, uuid)
        self._check_stream()
        left = kernel.left(self._before[there.name], there, self.alone)
        if left:
            raise AssertionError('\n'.join(left))
        # The verbs.
        self.sh(here, uuid, 'true')
        here.pause(uuid)
        copy = kernel.Copy(here, uuid)
        if not copy.frozen or copy.runs():
            raise AssertionError(f'a paused guest runs: {copy}')
        here.unpause(uuid)
        self._disarm()
        self.migrate(uuid, here, there)
        self._exactly_one(there, here, uuid)
        self._check_stream()
        # It has been looked at by another process meanwhile.
        self.check_busy(there)
        self._check_lines(there)
        self.stream.finish()
        there.delete(uuid)
        self._check_clean()

    def _exactly_one(self, here, there, uuid):
        copies = {h.name: kernel.Copy(h, uuid) for h in (here, there)}
        texts = {name: str(copy) for name, copy in copies.items()}
        if (len(copies[here.name].inits) != 1 or copies[there.name].pids or
                not copies[here.name].runs()):
            raise AssertionError(
                f'it is to run on host {here.name} alone: {texts}')
        if here.info(uuid)['state'] != 'running':
            raise AssertionError(f'it runs, and the agent says: '
                                 f'{here.info(uuid)}')
        self._check_lines(here)

    def _check_starved(self, uuid, verdict):
        """What is left of it works, once."""
        first, second = ((self.a, self.b) if verdict.startswith('source')
                         else (self.b, self.a))
        for here, there in ((first, second), (second, first)):
            if (len(kernel.Copy(here, uuid).inits) != 1 or
                    kernel.Copy(there, uuid).pids):
                raise AssertionError(f'it is to be on host {here.name} alone')
            self.assertEqual('running', here.info(uuid)['state'])
            self.sh(here, uuid, 'true')
            self._check_lines(here)
            if here is first:
                self._disarm()
                self.migrate(uuid, here, there)
        second.delete(uuid)
        self._check_clean()

    def _check_lines(self, host):
        problems = self.witness.problems(host.name)
        if problems:
            raise AssertionError('\n'.join(problems))
        self.check_database(host)

    def _check_stream(self):
        received = self.stream.received
        # Longer than the stream itself waits for an answer: one that is
        # silent for good, where that is allowed, has an error then.
        base.wait_for(
            lambda: self.stream.received > received + 20 or self.stream.error,
            'the stream to go on', SILENCE_S + 60)
        if self.stream.error and self._cut_allowed:
            self._cut_allowed = False
            self.cut = ', connections cut'
            self.stream = echo.Echo(
                one_host.ADDRESS, patience=SILENCE_S)
            return
        if self.stream.error:
            raise AssertionError(f'the stream broke: {self.stream.error!r}')

    def _check_lost(self, uuid):
        """No copy is left that could run, now or later, and the disk is as
        after a power failure.
        """
        self._at_most_one(uuid)
        running = kernel.running((self.a, self.b), uuid)
        if running:
            raise AssertionError(f'it is lost, and runs on {running}')
        for host in (self.a, self.b):
            host.restart_agent(host.faults, **self.agent_options)
        time.sleep(3)
        running = kernel.running((self.a, self.b), uuid)
        if running:
            raise AssertionError(f'it was lost, and now runs on {running}')
        here, there = ((self.b, self.a)
                       if self.status['phase'] == 'completed'
                       else (self.a, self.b))
        there.delete(uuid)
        self.assertEqual('stopped', here.info(uuid)['state'])
        here.prepare(uuid)
        self.attach(here, uuid)
        here.start_container(uuid)
        self.sh(here, uuid, 'true')
        if (len(kernel.Copy(here, uuid).inits) != 1 or
                kernel.Copy(there, uuid).inits):
            raise AssertionError('it is not started again')
        self._check_lines(here)
        here.delete(uuid)
        self._check_clean()

    def _check_clean(self):
        left = [text for host in (self.a, self.b) for text in kernel.left(
            self._before[host.name], host, self.alone)]
        if left:
            raise AssertionError('left behind:\n' + '\n'.join(left))
