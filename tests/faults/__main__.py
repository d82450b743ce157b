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


"""Run the matrix of faults, or a part of it.

``python -m tests.faults --steps '^move source' --faults 'agent|criu'``

As root. Nothing of this host is touched: each job has namespaces of its own.
The exit status says whether every promise was kept.
"""

import argparse
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time

from tests.faults import database
from tests.faults import rig
from tests.faults import table
from tests.runtime import base


def matrix(steps, faults):
    """:param steps, faults: regular expressions; "MODE STEP" is searched"""
    return [(mode, step, fault)
            for mode in rig.MODES
            for step in rig.steps(mode)
            if re.search(steps, f'{mode} {step}')
            for fault in rig.faults(mode)
            if re.search(faults, fault)]


_TITLES = {
    'move': 'Stop and copy',
    'post-copy': 'Post-copy',
    'cold': 'Cold migration and resize: the files',
    'life': 'One host: define, prepare, start, delete',
    'suspend': 'One host: suspend, resume',
}


def _table(results):
    return table.render(
        'python -m tests.faults',
        [table.Part(mode, _TITLES[mode], rig.steps(mode),
                    {name: fault.title
                     for name, fault in rig.faults(mode).items()})
         for mode in rig.MODES],
        results, matrix('', ''))


class Job:
    """One worker, started again when it has ended."""

    def __init__(self, rows, report, shared):
        self._rows, self._report = rows, report
        self._env = {**os.environ, **(
            {'PYCONTAINER_FAULTS_SHARED': '1'} if shared else {})}
        self._worker = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _start(self):
        return subprocess.Popen(
            [base.ROOT / 'tools/lib/in-host.sh', sys.executable, '-m',
             'tests.faults.worker'], cwd=base.ROOT, env=self._env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _run(self):
        while True:
            try:
                row = self._rows.get_nowait()
            except queue.Empty:
                break
            self._report(tuple(row), self._try(row))
        self._stop()

    def _try(self, row):
        if self._worker is None or self._worker.poll() is not None:
            self._worker = self._start()
        try:
            self._worker.stdin.write(json.dumps(row) + '\n')
            self._worker.stdin.flush()
            answer = json.loads(self._worker.stdout.readline())
            if 'broken' in answer:
                self._stop()
            return answer
        except (OSError, ValueError) as e:
            self._stop()
            return {'row': row, 'seconds': 0,
                    'broken': f'the worker has ended: {e!r}'}

    def _stop(self):
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stdin.close()
            worker.stdout.close()
            worker.wait()


def _load(path):
    try:
        return {tuple(r['row']): r for r in json.loads(path.read_text())}
    except FileNotFoundError:
        return {}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', default='', metavar='REGEX')
    parser.add_argument('--faults', default='', metavar='REGEX')
    parser.add_argument('--table', type=pathlib.Path, metavar='FILE',
                        help='write the results as reStructuredText')
    parser.add_argument(
        '--results', type=pathlib.Path, metavar='FILE',
        help='add the results to those of former runs, for the table')
    parser.add_argument('--missing', action='store_true',
                        help='only what FILE of --results has not, or broken')
    parser.add_argument('--jobs', type=int, default=2, metavar='N')
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--limit', type=float, metavar='SECONDS',
                        help='begin no more rows after so long')
    args = parser.parse_args()
    results = _load(args.results) if args.results else {}
    wanted = [row for row in matrix(args.steps, args.faults)
              if not args.missing or 'broken' in results.get(
                  row, {'broken': ''})]
    if args.list:
        print(*(' '.join(row) for row in wanted), sep='\n')
        return 0
    rows = queue.SimpleQueue()
    for row in wanted:
        rows.put(row)
    broken, done, lock = [], [], threading.Lock()
    began = time.monotonic()

    def report(row, result):
        with lock:
            results[row] = result
            done.append(row)
            if 'broken' in result:
                broken.append(row)
            print(f'[{len(done)}/{len(wanted)}] {" ".join(row)}: ' + (
                f'BROKEN: {result["broken"]}' if 'broken' in result
                else result['outcome'] or '-') +
                f' ({result["seconds"]} s)', flush=True)
            if args.results:
                args.results.write_text(json.dumps([*results.values()]))
            if args.limit and time.monotonic() - began > args.limit:
                while not rows.empty():
                    rows.get()

    # Built, if need be, before anybody waits for it.
    database.image()
    jobs = [Job(rows, report, args.jobs > 1)
            for _ in range(min(args.jobs, len(wanted)))]
    for job in jobs:
        job.thread.join()
    if args.table:
        args.table.write_text(_table(results))
    print(f'{len(done)} of {len(wanted)} tried, {len(broken)} broken')
    for row in broken:
        print('broken:', *row)
    return 1 if broken or len(done) < len(wanted) else 0


if __name__ == '__main__':
    sys.exit(main())
