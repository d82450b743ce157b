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

"""Callers that make, use, move and delete guests at the same time, and what
they count.
"""

import argparse
import os
import pathlib
import random
import threading
import time
import unittest

import prettytable


class Broken(AssertionError):
    """A promise was not kept."""


class Mixed:
    """A part of the long runs.

    Who uses it has ``create(guest)``, ``move(guest)`` and ``delete(guest)``,
    and others that :attr:`others` names; each but the last gives the guest
    back.
    """

    creates, moves, seed = 30, 12, 1
    callers, most = 3, 6
    #: Verbs that are tried while there is more to come.
    others: tuple[str, ...] = ('pause',)
    #: Outcomes that count as a creation, and as a move.
    creations: tuple[str, ...] = ('created',)
    migrations = ('migrated', 'migration failed')
    counted: tuple[str, ...] = ()
    #: Seconds between two kills.
    kill_every = (1.0, 5.0)

    def prepare(self):
        self.random = random.Random(self.seed)
        self.lock = threading.Lock()
        self._idle, self.population = [], 0
        self.errors = []
        self.count = dict.fromkeys(
            (*self.creations, *self.migrations, 'deleted', *self.counted), 0)

    def phase(self, creates, moves, kill):
        """Until so many were created and moved, and all are deleted."""
        self.until = creates, moves
        over = threading.Event()
        killer = threading.Thread(
            target=self._kill, args=(over,), daemon=True)
        if kill:
            killer.start()
        callers = [threading.Thread(target=self.call, daemon=True)
                   for _ in range(self.callers)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        over.set()
        if kill:
            killer.join()

    def phases(self, check, figures):
        """Half of it with kills, and some without; the last third tells
        whether anything grows.

        :param check: called after each
        :param figures: of the services, before and after the last third
        """
        parts = ((1 / 2, True), (2 / 3, False), (1, False))
        found = []
        for part, kill in parts:
            self.phase(int(self.creates * part), int(self.moves * part), kill)
            check()
            # Those that were started last have loaded and opened nothing yet.
            if not kill:
                found.append(figures())
        return found

    def _kill(self, over):
        while not over.wait(self.random.uniform(*self.kill_every)):
            self.kill_one()

    def call(self):
        """Do what there is to do."""
        try:
            while not self.errors:
                with self.lock:
                    job, guest = self._next()
                if job is None:
                    return
                if job == 'wait':
                    time.sleep(0.05)
                else:
                    getattr(self, job)(guest)
        except BaseException as e:
            self.errors.append(f'{type(e).__name__}: {e}')

    def _next(self):
        creates, moves = self.until
        started = sum(self.count[name] for name in self.creations)
        moved = sum(self.count[name] for name in self.migrations)
        done = started >= creates and moved >= moves
        if done and not self.population:
            return None, None
        jobs = []
        if started < creates or (moved < moves and not self.population):
            if self.population < self.most:
                jobs += ['create'] * 3
        if self._idle:
            if moved < moves:
                jobs += ['move'] * 4
            if done or started < creates:
                jobs += ['delete'] * (2 if not done else 9)
            if not done:
                jobs += self.others
        if not jobs:
            return 'wait', None
        job = self.random.choice(jobs)
        if job == 'create':
            # Counted now, so that the others do not make more.
            self.population += 1
            self.count['created'] += 1
            return job, None
        return job, self._idle.pop(self.random.randrange(len(self._idle)))

    def back(self, guest):
        with self.lock:
            self._idle.append(guest)

    def gone(self):
        """A guest has been deleted."""
        with self.lock:
            self.population -= 1

    def report(self, first, last, allowed):
        """Print what was counted, and what the services have grown by.

        :param first, last: name → pid, descriptors, threads, MiB
        :param allowed: what a service of a name may grow by
        :raises Broken: it is more
        """
        counts = prettytable.PrettyTable(['what', 'how many'], align='l')
        for name, number in self.count.items():
            counts.add_row([name, number])
        print(counts)
        figures = prettytable.PrettyTable(
            ['process', 'descriptors', 'threads', 'memory, MiB'], align='l')
        grown = []
        for name, (pid, *before) in first.items():
            now_pid, *now = last[name]
            figures.add_row([name, *(
                f'{b:.0f} → {n:.0f}' for b, n in zip(before, now))])
            if pid != now_pid:
                grown.append(f'{name} was started again')
            if any(n > b + more for b, n, more in zip(
                    before, now, allowed(name))):
                grown.append(f'{name} has grown: {before} → {now}')
        print(figures, flush=True)
        if grown:
            raise Broken('\n'.join(grown))


def figures_of(pid):
    """What :meth:`Mixed.report` wants of a process."""
    fields = dict(line.split(':', 1) for line in pathlib.Path(
        f'/proc/{pid}/status').read_text().splitlines())
    return (pid, len(os.listdir(f'/proc/{pid}/fd')), int(fields['Threads']),
            int(fields['RssAnon'].split()[0]) / 1024)


def arguments(doc):
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument('--creates', type=int, default=500)
    parser.add_argument('--moves', type=int, default=200)
    parser.add_argument('--seed', type=int, default=1)
    return parser.parse_args()


def run(case, options):
    """:returns: the exit status"""
    case.creates, case.moves = options.creates, options.moves
    case.seed = options.seed
    began = time.monotonic()
    result = unittest.TextTestRunner().run(case())
    print(f'{time.monotonic() - began:.0f} s, seed {options.seed}')
    return 0 if result.wasSuccessful() else 1
