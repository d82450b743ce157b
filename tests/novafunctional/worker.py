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

"""Runs tests of Nova's, one after the other, and says how each one ended.

  python -m tests.novafunctional.worker RESULTS LIMIT < IDS

After a test that cannot be ended the process ends itself.
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
import unittest

import tests.novafunctional  # noqa: F401
from tests.novafunctional import substitute

#: Times the limit of a test: when it did not heed that.
_TOO_LATE = 2

_HUNG = 3


class Result(unittest.TestResult):
    """Writes a line of JSON for every test."""

    def __init__(self, directory, harness, limit):
        super().__init__()
        self._directory = directory
        self._harness = harness
        self._limit = limit
        self._logs = {}

    def startTest(self, test):
        super().startTest(test)
        self._start = time.monotonic()
        self._outcome = ('passed', '')
        self._details = []
        self._timer = threading.Timer(
            self._limit * _TOO_LATE, self._hangs, args=(test.id(),))
        self._timer.daemon = True
        self._timer.start()

    def stopTest(self, test):
        self._timer.cancel()
        super().stopTest(test)
        self._write(test.id())

    def _write(self, ident):
        outcome, reason = self._outcome
        seconds = round(time.monotonic() - self._start, 1)
        if outcome == 'failed':
            (self._directory / f'{ident}.log').write_text(
                '\n'.join(self._details))
        with open(self._directory / 'results', 'a') as f:
            f.write(json.dumps({
                'id': ident, 'outcome': outcome, 'reason': reason,
                'seconds': seconds}) + '\n')

    def _hangs(self, ident):
        self._outcome = (
            'failed', f'not done after {self._limit * _TOO_LATE} s')
        self._details = [
            '\n'.join(traceback.format_stack(frame))
            for frame in sys._current_frames().values()]
        self._write(ident)
        self._end(_HUNG)

    def _end(self, status):
        """Whatever the test is at, leave nothing behind and end."""
        try:
            self._harness.remove()
        finally:
            os._exit(status)

    def stopped(self, number, _frame):
        self._end(128 + number)

    def _failed(self, error, details):
        self._details += [
            f'== {name}\n{content.as_text()}'
            for name, content in (details or {}).items()]
        if error is not None:
            self._details.append(''.join(traceback.format_exception(*error)))
        text = self._details[-1] if error else next(
            (content.as_text() for name, content in (details or {}).items()
             if name.startswith('traceback')), '')
        # The first failure is the reason; others follow from it.
        if self._outcome[0] == 'passed':
            self._outcome = ('failed', _last_line(text))

    def addError(self, test, err=None, details=None):
        self._failed(err, details)

    addFailure = addError

    def addSkip(self, test, reason=None, details=None):
        self._outcome = ('skipped', str(reason or ''))

    def addSuccess(self, test, details=None):
        pass


def _last_line(text):
    """What an exception says, which may be several lines of text."""
    lines = [line for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        # The first word of the last thing that is not indented.
        if not line.startswith(' ') and ': ' in line:
            return line[:400]
    return lines[-1][:400] if lines else ''


def main():
    directory, limit = pathlib.Path(sys.argv[1]), int(sys.argv[2])
    idents = sys.stdin.read().split()
    # Nova's services write to both when no test is there to hear them.
    progress = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    harness = substitute.Harness()
    harness.install()
    result = Result(directory, harness, limit)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, result.stopped)
    try:
        for ident in idents:
            print(ident, file=progress, flush=True)
            unittest.defaultTestLoader.loadTestsFromName(ident).run(result)
    finally:
        harness.remove()
    # Threads of services that a test has not stopped.
    os._exit(0)


if __name__ == '__main__':
    main()
