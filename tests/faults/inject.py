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


"""What goes wrong: one class for each kind of fault.

A step waits while :meth:`Fault.inject` works, and goes on before
:meth:`Fault.after`.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import threading
import time

from tests.faults import kernel

#: So long a step is late: less than what is given up after.
_LATE = 20.0
#: A host that has something to say says it within so long.
_SAYS_NOTHING = 20.0


class Fault:
    """:ivar title: of the column in the table"""

    #: What happens at the step itself, see nova_pycontainer.runtime.faults.
    action = 'wait'
    #: Whether it is the run's business to end it, for a peer that is mute
    #: meanwhile.
    lasts = False
    #: Whether it goes on until the guest's fate is known.
    stays = False
    #: The hosts on which the guest may end by it, as a machine does whose
    #: power fails.
    ends: tuple[str, ...] = ()
    #: Whether all must be right again soon: a program was killed, and nobody
    #: waits for a link, a disk or a machine.
    prompt = False

    def __init__(self, title):
        self.title = title

    def inject(self, rig):
        """:returns: whether there was something to break"""
        return True

    def after(self, rig):
        """:returns: the same, of what could not be found before"""
        return False

    def heal(self, rig):
        pass


class Raise(Fault):
    """Nobody dies; the step fails."""

    action = 'raise'


class KillAgent(Fault):

    prompt = True

    def __init__(self, title, *names):
        super().__init__(title)
        self._names = names

    def inject(self, rig):
        for name in self._names:
            getattr(rig, name).kill_agent()
        return True


class Kill(Fault):
    """kill -9 of a program that works for the agent.

    :param words: of its command line
    :param without: not in its command line
    :param soon: it may also be the next one that starts
    """

    prompt = True

    def __init__(self, title, name, *words, without='', soon=False):
        super().__init__(title)
        self._name, self._words, self._soon = name, words, soon
        self._without = without

    def _kill(self, rig, after=0):
        found = kernel.programs(
            getattr(rig, self._name), *self._words, without=self._without,
            after=after)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return bool(found)

    def inject(self, rig):
        self._last = kernel.last_pid()
        self._passed = rig.passed()
        return self._kill(rig)

    def after(self, rig):
        while (self._soon and rig.passed() == self._passed and
                not rig.over()):
            if self._kill(rig, self._last):
                return True
        return False


class KillRuntime(Kill):
    """kill -9 of the OCI runtime when the container is half made."""

    def after(self, rig):
        directory = pathlib.Path('/sys/fs/cgroup') / rig.a.cgroup_parent
        while rig.passed() == self._passed and not rig.over():
            if any(path.read_text() for path in directory.glob(
                    '*/cgroup.procs')) and self._kill(rig, self._last):
                return True
        return False


class CutLink(Fault):
    """Nothing passes between the hosts, and nobody is told."""

    def __init__(self, title, seconds=None):
        super().__init__(title)
        self._seconds, self.lasts = seconds, seconds is None

    def inject(self, rig):
        for host in (rig.a, rig.b):
            host.run('tc', 'qdisc', 'add', 'dev', rig.link, 'root',
                     'pfifo', 'limit', '0')
        return True

    def after(self, rig):
        if not self.lasts:
            time.sleep(self._seconds)
            self.heal(rig)
        return True

    def heal(self, rig):
        for host in (rig.a, rig.b):
            host.run('tc', 'qdisc', 'del', 'dev', rig.link, 'root',
                     check=False)


class OfHost(Fault):
    """What one host lacks for a while."""

    stays = True

    def __init__(self, title, name):
        super().__init__(title)
        self._name = name


class FillDisk(OfHost):
    """Not a byte is left where a host keeps its instances."""

    def _path(self, rig):
        return getattr(rig, self._name).instances / '.filler'

    def inject(self, rig):
        path = self._path(rig)
        with open(path, 'wb', buffering=0) as f:
            # What is only reserved is soon there, whatever the size.
            at = 0
            for size in (1 << 28, 1 << 24):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(f.fileno(), at, size)
                        at += size
            f.seek(0, os.SEEK_END)
            for size in (1 << 20, 4096, 1):
                try:
                    while f.write(bytes(size)) == size:
                        pass
                except OSError:
                    continue
        return True

    def heal(self, rig):
        self._path(rig).unlink(missing_ok=True)


class ReadOnly(OfHost):
    """Where a host keeps its instances the agent can write nothing down.

    The directories are immutable: a file system becomes read-only for nobody
    while a console's log is open for writing.
    """

    def _directories(self, rig):
        top = getattr(rig, self._name).instances
        return [top, *(path for path in top.iterdir()
                       if path.is_dir() and path.name != 'lost+found')]

    def _change(self, rig, how):
        top, *others = self._directories(rig)
        subprocess.run(['chattr', how, top], check=True, timeout=30)
        # One that was to go does so as soon as it can.
        subprocess.run(['chattr', how, *others], check=how == '+i',
                       timeout=30, stderr=subprocess.DEVNULL)

    def inject(self, rig):
        self._change(rig, '+i')
        return True

    def heal(self, rig):
        if getattr(rig, self._name).has_power():
            self._change(rig, '-i')


class Memory(OfHost):
    """A host has no more memory for guests than they use now."""

    #: cgroup v1, as tools/lib/in-host.sh arranges it, and v2
    _FILES = (('/run/cgroup1/memory', 'memory.limit_in_bytes',
               'memory.usage_in_bytes', '-1'),
              ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes',
               'memory.usage_in_bytes', '-1'),
              ('/sys/fs/cgroup', 'memory.max', 'memory.current', 'max'))

    def __init__(self, title, name):
        super().__init__(title, name)
        self._over = threading.Event()
        self._thread = None

    def _files(self, rig):
        parent = getattr(rig, self._name).cgroup_parent
        for top, limit, used, none in self._FILES:
            directory = pathlib.Path(top, parent)
            if (directory / limit).exists():
                return directory / limit, directory / used, none
        return None

    def inject(self, rig):
        found = self._files(rig)
        # Whom the kernel's OOM killer takes in a restored guest is the
        # guest's own matter. One that was given away needs nothing.
        last = {'a': 'source.committed', 'b': 'destination.restored'}
        if found is None or last[self._name] in rig.passed():
            return False
        limit, used, _ = found
        limit.write_text(str(int(used.read_text()) + (256 << 10)))
        self._over.clear()
        if self._name == 'a':
            self._thread = threading.Thread(
                target=self._count, args=(rig,), daemon=True)
            self._thread.start()
        return True

    def _count(self, rig):
        """What was killed on a source that the guest has left since."""
        while not self._over.wait(0.05):
            rig.killed = max(rig.killed, kernel.oom_kills(
                getattr(rig, self._name), rig.database.uuid))

    def heal(self, rig):
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        found = self._files(rig)
        if found is not None:
            found[0].write_text(found[2])


class Late(Fault):
    """The step comes to pass, when nobody expects it any more."""

    def inject(self, rig):
        time.sleep(_LATE)
        return True


class Mangle(Fault):
    """A host's next message to the other one is another.

    :param how: see nova_pycontainer.runtime.faults
    """

    def __init__(self, title, name, how):
        super().__init__(title)
        self._name, self._how = name, how

    def _path(self, rig):
        return rig.plan(getattr(rig, self._name))

    def inject(self, rig):
        self._path(rig).write_text(f'frame={self._how}')
        return False

    def after(self, rig):
        deadline = time.monotonic() + _SAYS_NOTHING
        while not rig.over() and time.monotonic() < deadline:
            if not self._path(rig).read_text():
                return True
            time.sleep(0.05)
        done = not self._path(rig).read_text()
        self.heal(rig)
        return done

    def heal(self, rig):
        self._path(rig).write_text('')


class PowerLoss(Fault):
    """Everything on a host ends at once, and the host boots."""

    def __init__(self, title, *names):
        super().__init__(title)
        self.ends = names

    def inject(self, rig):
        for name in self.ends:
            rig.power_off(getattr(rig, name))
        return True


#: Of a migration from a to b.
MIGRATION = {
    'fails': Raise('the step fails'),
    'agent-a': KillAgent("source's agent killed", 'a'),
    'agent-b': KillAgent("destination's agent killed", 'b'),
    'agents': KillAgent('both agents killed', 'a', 'b'),
    'criu-a': Kill(
        "source's criu killed", 'a', 'criu', without='lazy-pages'),
    'criu-b': Kill(
        "destination's criu killed", 'b', 'criu', without='lazy-pages'),
    'pages': Kill('daemon for pages killed', 'b', 'criu', 'lazy-pages',
                  soon=True),
    'copier-a': Kill("source's rsync killed", 'a', 'rsync', soon=True),
    'copier-b': Kill("destination's rsync killed", 'b', 'rsync', soon=True),
    'late': Late('20 s late'),
    'link-1s': CutLink('link cut for 1 s', 1.0),
    'link-30s': CutLink('link cut for 30 s', 30.0),
    'link-cut': CutLink('link cut'),
    'disk-a': FillDisk("source's disk full", 'a'),
    'disk-b': FillDisk("destination's disk full", 'b'),
    'readonly-a': ReadOnly("source's disk read-only", 'a'),
    'readonly-b': ReadOnly("destination's disk read-only", 'b'),
    'memory-a': Memory("source's memory used up", 'a'),
    'memory-b': Memory("destination's memory used up", 'b'),
    'twice-a': Mangle("source's next message twice", 'a', 'twice'),
    'twice-b': Mangle("destination's next message twice", 'b', 'twice'),
    'garbage-a': Mangle("source's next message garbage", 'a', 'garbage'),
    'garbage-b': Mangle("destination's next message garbage", 'b', 'garbage'),
    'nonsense-a': Mangle("source's next message nonsense", 'a', 'nonsense'),
    'nonsense-b': Mangle(
        "destination's next message nonsense", 'b', 'nonsense'),
    'power-a': PowerLoss("source's power lost", 'a'),
    'power-b': PowerLoss("destination's power lost", 'b'),
    'power': PowerLoss("both hosts' power lost", 'a', 'b'),
}
#: Of a cold migration from a to b: nothing of it runs.
COLD = {name: fault for name, fault in MIGRATION.items()
        if name not in ('criu-a', 'criu-b', 'pages', 'memory-a', 'memory-b')}
#: Of define, prepare, start and delete on a.
LIFE = {
    'fails': Raise('the step fails'),
    'agent-a': KillAgent('agent killed', 'a'),
    'runtime': Kill('crun killed', 'a', 'crun', soon=True),
    'runtime-late': KillRuntime('crun killed, later', 'a', 'crun', soon=True),
    'disk-a': FillDisk('disk full', 'a'),
    'readonly-a': ReadOnly('disk read-only', 'a'),
    'power-a': PowerLoss('power lost', 'a'),
}
#: Of suspend and resume on a.
SUSPEND = {
    'fails': Raise('the step fails'),
    'agent-a': KillAgent('agent killed', 'a'),
    'criu-a': Kill('criu killed', 'a', 'criu', soon=True),
    'disk-a': FillDisk('disk full', 'a'),
    'readonly-a': ReadOnly('disk read-only', 'a'),
    'power-a': PowerLoss('power lost', 'a'),
}
