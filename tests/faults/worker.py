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


"""Tries the rows that come in, one a line, on two hosts of its own.

Started by :mod:`tests.faults.__main__` in namespaces of its own.
"""

import json
import os
import sys
import time
import unittest

from tests.faults import one_host
from tests.faults import rig


class Worker(rig.Rig):
    """Ends when a row was broken: what is left of that one must not be
    another one's.
    """

    alone = not os.environ.get('PYCONTAINER_FAULTS_SHARED')

    def runTest(self):
        for line in sys.stdin:
            row = json.loads(line)
            answer = {'row': row}
            began = time.monotonic()
            try:
                answer['outcome'] = self.row(*row)
            except one_host.Absent:
                answer['outcome'] = None
            except rig.Broken as e:
                answer['broken'] = str(e)
            if self.settled is not None:
                answer['settled'] = self.settled
            answer['seconds'] = round(time.monotonic() - began, 1)
            print(json.dumps(answer), file=OUT, flush=True)
            if 'broken' in answer:
                break


#: What a test prints is no answer.
OUT = os.fdopen(os.dup(1), 'w')


def main():
    os.dup2(2, 1)
    result = unittest.TestResult()
    Worker('runTest').run(result)
    for _, text in result.errors + result.failures:
        print(text, file=sys.stderr, flush=True)
    return 0 if result.wasSuccessful() else 1


if __name__ == '__main__':
    sys.exit(main())
